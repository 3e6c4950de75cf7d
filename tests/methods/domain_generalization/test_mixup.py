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


@pytest.fixture
def uniform_shares(monkeypatch):
    """Shares without the Beta distribution, which takes seconds to compile; its parameters are recorded."""
    asked = []

    def uniform(key, a, b, shape, dtype):
        asked.append((a, b, shape, dtype))
        return jax.random.uniform(key, shape, dtype)

    monkeypatch.setattr(jax.random, "beta", uniform)
    return asked


def test_each_environment_is_mixed_with_the_next_of_a_random_order_by_a_share_of_its_own(uniform_shares):
    keys = jax.random.split(problem.KEY, 500)
    mix = jax.jit(jax.vmap(lambda key: interdomain_mixup(key, IMAGES, LABELS, 0.3)))
    images, first, second, lam = jax.device_get(mix(keys))
    assert uniform_shares == [(0.3, 0.3, (E,), np.float32)]
    np.testing.assert_array_equal(first[:, :, 0], first[:, :, 1])
    orders = first[:, :, 0]
    for order, other, share, mixed in zip(orders, second[:, :, 0], lam, images):
        assert sorted(order) == list(range(E))
        np.testing.assert_array_equal(other, np.roll(order, -1))
        expected = share[:, None] * np.eye(E)[order] + (1 - share[:, None]) * np.eye(E)[np.roll(order, -1)]
        np.testing.assert_allclose(mixed, np.broadcast_to(expected[:, None, None], mixed.shape), atol=1e-6)
    assert len(np.unique(orders, axis=0)) == 24
    assert np.abs(np.corrcoef(lam.T) - np.eye(E)).max() < 0.2


METHOD = mixup(problem.NETWORK, problem.OPTIMIZER, alpha=0.8)


def test_updates_are_those_of_torch(uniform_shares):
    torch = pytest.importorskip("torch")
    mix = jax.jit(
        lambda key, batch: interdomain_mixup(jax.random.split(key)[0], batch["image"], batch["label"], 0.8)
    )
    draws = [mix(jax.random.fold_in(problem.KEY, step), batch) for step, batch in enumerate(problem.BATCHES)]
    mixed = [{"image": images, "label": first} for images, first, _, _ in draws]

    def loss(step, logits, features, labels, layers):
        value, hits = 0, []
        for f, y_i, y_j, lam in zip(logits, *map(np.array, draws[step][1:])):
            y_i, y_j, lam = torch.tensor(y_i).long(), torch.tensor(y_j).long(), float(lam)
            value = value + lam * torch.nn.functional.cross_entropy(f, y_i)
            value = value + (1 - lam) * torch.nn.functional.cross_entropy(f, y_j)
            hits.append(f.argmax(1) == (y_i if lam > 0.5 else y_j))
        return value / 3, {"accuracy": torch.cat(hits).double().mean()}

    problem.assert_follows(METHOD, loss, list(zip(problem.BATCHES, mixed)))


def test_with_share_1_it_is_erm_on_environments_in_another_order(monkeypatch):
    monkeypatch.setattr(jax.random, "beta", lambda key, a, b, shape, dtype: jnp.ones(shape, dtype))
    method = mixup(problem.NETWORK, problem.OPTIMIZER)
    batch, update = problem.BATCHES[0], jax.jit(method.update)
    state = problem.ERM.init(problem.KEY, batch)
    expected, expected_metrics = jax.jit(problem.ERM.update)(state, batch, problem.KEY)
    for seed in range(3):  # which draws the order
        ours, metrics = update(method.init(problem.KEY, batch), batch, jax.random.key(seed))
        for name in ("loss", "accuracy"):
            np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-6)
        jax.tree.map(problem.assert_close, ours.variables, expected.variables)
