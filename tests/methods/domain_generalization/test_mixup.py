import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.methods.domain_generalization.mixup import interdomain_mixup, mixup
from tests.methods.domain_generalization import problem

E = 4
# Environment e is e_e at every pixel, so that a mixture shows what it is made of.
IMAGES = jnp.broadcast_to(np.eye(E, dtype=np.float32)[:, None, None], (E, 2, 3, E))
LABELS = jnp.broadcast_to(np.arange(E)[:, None], (E, 2))
MIX = jax.jit(jax.vmap(lambda key, alpha: interdomain_mixup(key, IMAGES, LABELS, alpha), in_axes=(0, None)))
KEYS = jax.random.split(problem.KEY, 2000)


def test_each_environment_is_mixed_with_the_next_of_a_random_order_by_one_share():
    images, first, second, lam = jax.device_get(MIX(KEYS, 0.2))
    orders = first[:, :, 0]
    for order, other, share, mixed in zip(orders[:50], second[:50], lam[:50], images[:50]):
        assert sorted(order) == list(range(E))
        np.testing.assert_array_equal(other[:, 0], np.roll(order, -1))
        for i in range(E):
            expected = share[i] * np.eye(E)[order[i]] + (1 - share[i]) * np.eye(E)[order[(i + 1) % E]]
            np.testing.assert_allclose(mixed[i], np.broadcast_to(expected, (2, 3, E)), atol=1e-6)
    np.testing.assert_array_equal(first[:, :, 0], first[:, :, 1])
    orders, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(orders) == 24
    assert counts.min() > 2000 / 24 / 2


@pytest.mark.parametrize("alpha", [0.02, 0.2, 2.0])
def test_shares_are_beta_and_independent_of_each_other(alpha):
    lam = np.float64(MIX(KEYS, alpha)[3])
    assert np.all((lam >= 0) & (lam <= 1))
    variance = 1 / (4 * (2 * alpha + 1))
    np.testing.assert_allclose(lam.mean(), 0.5, atol=4 * (variance / lam.size) ** 0.5)
    np.testing.assert_allclose(lam.var(), variance, rtol=0.06)
    correlation = np.corrcoef(lam.T) - np.eye(E)
    assert np.abs(correlation).max() < 0.1


METHOD = mixup(problem.NETWORK, problem.OPTIMIZER, alpha=0.8)


def test_updates_are_those_of_torch():
    torch = pytest.importorskip("torch")
    mix = jax.jit(
        lambda key, batch: interdomain_mixup(jax.random.split(key)[0], batch["image"], batch["label"], 0.8)
    )
    draws = [mix(jax.random.fold_in(problem.KEY, step), batch) for step, batch in enumerate(problem.BATCHES)]
    mixed = [{"image": images, "label": first} for images, first, _, _ in draws]

    def loss(step, logits, features, labels, layers):
        value, hits = 0, []
        for f, y_i, y_j, lam in zip(logits, *map(np.asarray, draws[step][1:])):
            y_i, y_j, lam = torch.tensor(y_i).long(), torch.tensor(y_j).long(), float(lam)
            value = value + lam * torch.nn.functional.cross_entropy(f, y_i)
            value = value + (1 - lam) * torch.nn.functional.cross_entropy(f, y_j)
            hits.append(f.argmax(1) == (y_i if lam > 0.5 else y_j))
        return value / 3, {"accuracy": torch.cat(hits).double().mean()}

    problem.assert_follows(METHOD, loss, list(zip(problem.BATCHES, mixed)))


def test_with_share_1_it_is_erm_on_environments_in_another_order(monkeypatch):
    monkeypatch.setattr(jax.random, "beta", lambda key, a, b, shape, dtype: jnp.ones(shape, dtype))
    method = mixup(problem.NETWORK, problem.OPTIMIZER)
    batch, orders = problem.BATCHES[0], set()
    update, mix = jax.jit(method.update), jax.jit(interdomain_mixup, static_argnums=3)
    state = problem.ERM.init(problem.KEY, batch)
    expected, expected_metrics = jax.jit(problem.ERM.update)(state, batch, problem.KEY)
    for seed in range(3):
        key = jax.random.key(seed)
        images, labels, _, _ = mix(jax.random.split(key)[0], batch["image"], batch["label"], 0.2)
        order = [int(np.argmax((image == batch["image"]).all((1, 2, 3, 4)))) for image in images]
        orders.add(tuple(order))
        np.testing.assert_array_equal(images, batch["image"][order])
        np.testing.assert_array_equal(labels, batch["label"][order])
        ours, metrics = update(method.init(problem.KEY, batch), batch, key)
        for name in ("loss", "accuracy"):
            np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-6)
        jax.tree.map(problem.assert_close, ours.variables, expected.variables)
    assert len(orders) > 1
