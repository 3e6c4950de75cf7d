import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.methods.domain_generalization.irm import irm, irm_penalty
from tests.methods.domain_generalization import problem

RNG = np.random.default_rng(0)
LOGITS, LABELS = 2 * RNG.normal(size=(3, 7, 4)), RNG.integers(0, 4, (3, 7)).astype(np.int32)
SCALARS, TARGETS = 2 * RNG.normal(size=(3, 7, 1)), RNG.integers(0, 2, (3, 7)).astype(np.int32)


def _torch_gradient(loss, logits, labels):
    """G by its definition: the derivative with respect to the scalar that the logits are multiplied by."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    if loss == "softmax":
        risk = functional.cross_entropy(logits * w, labels)
    else:
        risk = functional.binary_cross_entropy_with_logits(logits.flatten() * w, labels.double())
    return torch.autograd.grad(risk, w, create_graph=True)[0]


def _torch_penalty(loss, estimator, logits, labels):
    if estimator == "square":
        return _torch_gradient(loss, logits, labels) ** 2
    even, odd = (_torch_gradient(loss, logits[i::2], labels[i::2]) for i in (0, 1))
    return even * odd


def test_every_closed_form_is_the_derivative_and_has_its_gradient():
    torch = pytest.importorskip("torch")
    forms = {
        f"{loss} {estimator} {e}": (loss, estimator, e)
        for loss in ("softmax", "sigmoid")
        for estimator in ("square", "split_half")
        for e in range(3)
    }

    def expected(*logits):
        return {
            name: _torch_penalty(
                loss,
                estimator,
                logits[loss == "sigmoid"][e],
                torch.tensor((LABELS if loss == "softmax" else TARGETS)[e]).long(),
            )
            for name, (loss, estimator, e) in forms.items()
        }

    def ours(logits, scalars):
        return {
            name: irm_penalty(logits, LABELS, estimator, loss)[e]
            if loss == "softmax"
            else irm_penalty(scalars, TARGETS, estimator, loss)[e]
            for name, (loss, estimator, e) in forms.items()
        }

    _, gradients = problem.assert_gradients(ours, expected, LOGITS, SCALARS)
    # As the sheet has it: 2 G [(σ - y) + l σ (1 - σ)] / n.
    l, y = SCALARS[..., 0], TARGETS
    s = 1 / (1 + np.exp(-l))
    G = ((s - y) * l).mean(1, keepdims=True)
    by_hand = 2 * G * ((s - y) + l * s * (1 - s)) / 7
    for e in range(3):
        np.testing.assert_allclose(gradients[f"sigmoid square {e}"][1][e, :, 0], by_hand[e], rtol=1e-10)


def test_halves_may_disagree_and_their_product_is_without_the_bias_of_the_square():
    # Over all pairs of draws from a population the product's mean is the square of the mean.
    population, labels = LOGITS[0].astype(np.float32), LABELS[0]
    first, second = (i.ravel() for i in np.indices((7, 7)))
    pairs = np.stack([population[first], population[second]], axis=1)
    of_pairs = np.stack([labels[first], labels[second]], axis=1)

    @jax.jit
    def penalties():
        square, product = (irm_penalty(pairs, of_pairs, form) for form in ("square", "split_half"))
        return irm_penalty(population[None], labels[None], "square")[0], square, product

    exact, square, product = penalties()
    assert np.min(product) < 0 <= np.min(square)
    np.testing.assert_allclose(np.mean(product), exact, rtol=1e-4)
    assert np.mean(square) > 1.5 * exact


def test_huge_logits_give_no_nan():
    labels = np.array([[0, 1]])

    def penalty(logits):
        softmax = irm_penalty(logits, labels, "square", "softmax")
        return (softmax + irm_penalty(logits[..., :1], labels, "square", "sigmoid")).sum()

    value, gradient = jax.jit(jax.value_and_grad(penalty))(jnp.array([[[1e4, -1e4], [-1e4, 1e4]]]))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_one_row_has_no_halves():
    logits, labels = LOGITS[:, :1].astype(np.float32), LABELS[:, :1]
    with pytest.raises(UserError, match="two examples"):
        jax.eval_shape(irm_penalty, logits, labels)
    assert jax.eval_shape(lambda: irm_penalty(logits, labels, "square")).shape == (3,)


def test_domainbeds_updates_are_those_of_torch_with_a_new_adam_at_the_end_of_annealing():
    torch = pytest.importorskip("torch")
    anneal, weight = 3, 20.0

    def loss(step, logits, features, labels, layers):
        nll = sum(torch.nn.functional.cross_entropy(f, y) for f, y in zip(logits, labels)) / 3
        penalty = sum(_torch_penalty("softmax", "split_half", f, y) for f, y in zip(logits, labels)) / 3
        hits = torch.cat([f.argmax(1) == y for f, y in zip(logits, labels)])
        value = nll + (weight if step >= anneal else 1.0) * penalty
        return value, {"risk": nll, "penalty": penalty, "accuracy": hits.double().mean()}

    method = irm(problem.NETWORK, problem.OPTIMIZER, weight=weight, anneal_steps=anneal)
    state = problem.assert_follows(method, loss, reset_at=anneal)
    assert state.step == problem.STEPS
    assert state.opt_state[0].count == problem.STEPS - anneal


def test_official_updates_are_those_of_torch_with_decay_in_the_loss_and_one_adam():
    torch = pytest.importorskip("torch")
    anneal, weight, decay = 3, 91.0, 0.01

    def loss(step, logits, features, labels, layers):
        risks = [
            torch.nn.functional.binary_cross_entropy_with_logits(f[:, 0], y.double())
            for f, y in zip(logits, labels)
        ]
        penalty = sum(_torch_penalty("sigmoid", "square", f, y) for f, y in zip(logits, labels)) / 2
        value = sum(risks) / 2
        for tensor in jax.tree.leaves(layers):
            value = value + decay * tensor.norm() ** 2
        p = weight if step >= anneal else 1.0
        value = value + p * penalty
        if p > 1:
            value = value / p
        hits = torch.cat([(f[:, 0] > 0) == (y == 1) for f, y in zip(logits, labels)])
        return value, {"risk": sum(risks) / 2, "penalty": penalty, "accuracy": hits.double().mean()}

    method = irm(
        problem.ONE_LOGIT,
        problem.OPTIMIZER,
        weight=weight,
        anneal_steps=anneal,
        estimator="square",
        loss="sigmoid",
        l2=decay,
        rescale=True,
        reset_optimizer=False,
    )
    state = problem.assert_follows(method, loss, problem.BINARY)
    assert state.opt_state[0].count == problem.STEPS
