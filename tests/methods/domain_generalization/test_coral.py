import itertools

import jax
import numpy as np
import pytest

from jaxlab.methods.domain_generalization.coral import coral, coral_penalty
from tests.methods.domain_generalization import problem

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(6, 4)), 1 + 2 * RNG.normal(size=(9, 4))
PENALTY = jax.jit(jax.value_and_grad(coral_penalty, argnums=(0, 1)))


def _torch_penalty(x, y):
    """The covariances by their definition, one entry after the other."""
    torch = pytest.importorskip("torch")
    value = torch.mean((x.mean(0) - y.mean(0)) ** 2)
    d = x.shape[1]
    for j, k in itertools.product(range(d), repeat=2):
        (c_x, c_y) = (
            ((f[:, j] - f[:, j].mean()) * (f[:, k] - f[:, k].mean())).sum() / (len(f) - 1) for f in (x, y)
        )
        value = value + (c_x - c_y) ** 2 / d**2
    return value


def _penalty(x, y):
    return {"penalty": coral_penalty(x, y)}


def test_penalty_and_gradient_are_those_of_torch_for_sets_of_different_size():
    problem.assert_gradients(_penalty, lambda x, y: {"penalty": _torch_penalty(x, y)}, X, Y)


def test_the_same_features_in_any_order_have_no_penalty():
    x = X.astype(np.float32)
    value, gradients = PENALTY(x, x)
    assert value < 1e-12
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0, atol=1e-6)
    assert PENALTY(x, x[::-1])[0] < 1e-12


def test_single_rows_match_their_means_only():
    x, y = X[:1].astype(np.float32), Y[:1].astype(np.float32)
    value, gradients = PENALTY(x, y)
    np.testing.assert_allclose(value, np.mean((x - y) ** 2), rtol=1e-5)
    np.testing.assert_allclose(gradients[0], (x - y) / 2, rtol=1e-5)


METHOD = coral(problem.NETWORK, problem.OPTIMIZER, weight=2.0)


def test_updates_are_those_of_torch():
    torch = pytest.importorskip("torch")

    def loss(step, logits, features, labels, layers):
        risk = sum(torch.nn.functional.cross_entropy(f, y) for f, y in zip(logits, labels)) / 3
        penalty = sum(_torch_penalty(x, y) for x, y in itertools.combinations(features, 2)) / 3
        return risk + 2 * penalty, {"risk": risk, "penalty": penalty}

    problem.assert_follows(METHOD, loss)


def test_identical_environments_are_not_penalised():
    batch = jax.tree.map(lambda x: np.broadcast_to(x[:1], x.shape), problem.BATCHES[0])
    state = METHOD.init(problem.KEY, batch)
    ours, metrics = jax.jit(METHOD.update)(state, batch, problem.KEY)
    assert metrics["penalty"] < 1e-12
    theirs, _ = jax.jit(problem.ERM.update)(problem.ERM.init(problem.KEY, batch), batch, problem.KEY)
    jax.tree.map(problem.assert_close, ours.variables, theirs.variables)
