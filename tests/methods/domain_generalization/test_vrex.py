import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.methods.domain_generalization.vrex import vrex, vrex_penalty
from tests.methods.domain_generalization import problem

KINDS = ("variance", "pair_square", "pair_abs")
RISKS = np.array([0.3, 1.7, 0.9, 0.2])


def _penalties(risks):
    return {kind: vrex_penalty(risks, kind) for kind in KINDS}


def test_penalties_and_gradients_are_those_of_their_formulas():
    torch = pytest.importorskip("torch")

    def expected(risks):
        differences = torch.stack([a - b for a, b in itertools.combinations(risks, 2)])
        return {
            "variance": ((risks - risks.mean()) ** 2).mean(),
            "pair_square": (differences**2).sum(),
            "pair_abs": differences.abs().sum(),
        }

    for risks in (RISKS, RISKS[:2]):
        values, _ = problem.assert_gradients(_penalties, expected, risks)
        np.testing.assert_allclose(values["pair_square"], len(risks) ** 2 * values["variance"])


@pytest.mark.parametrize("count", [1, 3])
def test_equal_risks_have_no_penalty_and_no_gradient(count):
    risks = jnp.full(count, 0.5)
    values, gradients = jax.jit(lambda r: (_penalties(r), jax.jacrev(_penalties)(r)))(risks)
    for kind in KINDS:
        np.testing.assert_allclose(values[kind], 0, atol=1e-12)
        np.testing.assert_allclose(gradients[kind], 0, atol=1e-6)


def test_domainbeds_updates_are_those_of_torch_with_a_new_adam_at_the_end_of_annealing():
    torch = pytest.importorskip("torch")
    anneal, weight = 2, 15.0

    def loss(step, logits, features, labels, layers):
        risks = torch.stack([torch.nn.functional.cross_entropy(f, y) for f, y in zip(logits, labels)])
        penalty = risks.var(unbiased=False)
        value = risks.mean() + (weight if step >= anneal else 1.0) * penalty
        return value, {"risk": risks.mean(), "penalty": penalty}

    method = vrex(problem.NETWORK, problem.OPTIMIZER, weight=weight, anneal_steps=anneal)
    state = problem.assert_follows(method, loss, reset_at=anneal)
    assert state.opt_state[0].count == problem.STEPS - anneal


def test_official_updates_are_those_of_torch_with_the_sum_of_the_risks():
    torch = pytest.importorskip("torch")
    anneal, weight, decay = 2, 40.0, 0.01

    def loss(step, logits, features, labels, layers):
        first, second = (
            torch.nn.functional.binary_cross_entropy_with_logits(f[:, 0], y.double())
            for f, y in zip(logits, labels)
        )
        penalty = (first - second) ** 2
        value = first + second + decay * sum((tensor**2).sum() for tensor in jax.tree.leaves(layers))
        p = weight if step >= anneal else 1.0
        value = value + p * penalty
        if p > 1.0:
            value = value / p
        return value, {"risk": (first + second) / 2, "penalty": penalty}

    method = vrex(
        problem.ONE_LOGIT,
        problem.OPTIMIZER,
        weight=weight,
        anneal_steps=anneal,
        kind="pair_square",
        reduction="sum",
        loss="sigmoid",
        l2=decay,
        rescale=True,
        reset_optimizer=False,
    )
    problem.assert_follows(method, loss, problem.BINARY)
