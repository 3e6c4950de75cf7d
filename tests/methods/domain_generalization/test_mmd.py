import itertools

import jax
import numpy as np
import pytest

from jaxlab.methods.domain_generalization.mmd import GAMMAS, mmd, mmd_penalty
from tests.methods.domain_generalization import problem

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(5, 3)), 0.5 + RNG.normal(size=(7, 3))
PENALTY = jax.jit(jax.value_and_grad(mmd_penalty, argnums=(0, 1)))


def _torch_penalty(x, y, expanded=True):
    torch = pytest.importorskip("torch")

    def kernel(a, b):
        if expanded:
            squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
            squares = squares.clamp_min(1e-30)
        else:
            squares = ((a[:, None] - b[None]) ** 2).sum(-1)
        return sum(torch.exp(-gamma * squares) for gamma in (0.001, 0.01, 0.1, 1, 10, 100, 1000))

    return kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()


def _penalty(x, y):
    return {"penalty": mmd_penalty(x, y)}


def test_penalty_and_gradient_are_those_of_torch_for_sets_of_different_size():
    problem.assert_gradients(_penalty, lambda x, y: {"penalty": _torch_penalty(x, y)}, X, Y)
    problem.assert_gradients(_penalty, lambda x, y: {"penalty": _torch_penalty(x, y, expanded=False)}, X, Y)


def test_the_same_features_have_no_penalty_and_equal_rows_a_finite_gradient():
    x = X.astype(np.float32)
    x[1] = x[0]
    value, gradients = PENALTY(x, x)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0, atol=1e-4)
    value, gradients = PENALTY(x, np.zeros_like(x))
    assert all(np.isfinite(leaf).all() for leaf in (value, *gradients))


def test_far_features_have_the_largest_penalty():
    # k(x, y) = 0, and k of a set with itself is 7 on the diagonal.
    x = np.zeros((4, 3), np.float32)
    np.testing.assert_allclose(PENALTY(x, x + 1e4)[0], 2 * len(GAMMAS), rtol=1e-6)


def test_updates_are_those_of_torch():
    torch = pytest.importorskip("torch")

    def loss(step, logits, features, labels, layers):
        risk = sum(torch.nn.functional.cross_entropy(f, y) for f, y in zip(logits, labels)) / 3
        penalty = sum(_torch_penalty(x, y) for x, y in itertools.combinations(features, 2)) / 3
        return risk + 0.5 * penalty, {"risk": risk, "penalty": penalty}

    problem.assert_follows(mmd(problem.NETWORK, problem.OPTIMIZER, weight=0.5), loss)
