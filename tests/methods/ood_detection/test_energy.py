import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.methods.ood_detection.energy import (
    energy,
    energy_bounded_loss,
    energy_hinge,
    max_logit,
    maximum_softmax_probability,
    outlier_exposure_loss,
    propose_margins,
)

SCORES = (energy, maximum_softmax_probability, max_logit, outlier_exposure_loss)
GRADIENTS = {score: jax.jit(jax.value_and_grad(score)) for score in SCORES}
HINGE = jax.jit(energy_hinge)
BOUNDED = jax.jit(jax.value_and_grad(energy_bounded_loss, argnums=(0, 2), has_aux=True))


def _logits(rows: int, classes: int = 7, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=(rows, classes))).astype(np.float32)


def _labels(rows: int, classes: int = 7) -> np.ndarray:
    return np.random.default_rng(9).integers(0, classes, rows).astype(np.int32)


def _compare_with_torch(ours, theirs, logits: np.ndarray) -> None:
    """Values per example and the gradient of their sum."""
    torch = pytest.importorskip("torch")
    leaf = torch.tensor(logits, requires_grad=True)
    expected = theirs(torch, leaf)
    expected.sum().backward()
    values, gradient = jax.jit(lambda f: (ours(f), jax.grad(lambda f: ours(f).sum())(f)))(logits)
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_scores_and_their_gradients_agree_with_the_official_code(temperature):
    logits, t = _logits(9), temperature
    _compare_with_torch(lambda f: energy(f, t), lambda torch, f: -(t * torch.logsumexp(f / t, dim=1)), logits)
    _compare_with_torch(
        lambda f: maximum_softmax_probability(f, t),
        lambda torch, f: -torch.nn.functional.softmax(f / t, dim=1).max(dim=1).values,
        logits,
    )
    _compare_with_torch(max_logit, lambda torch, f: -f.max(dim=1).values, logits)


def test_outlier_exposure_agrees_with_the_official_code():
    _compare_with_torch(
        outlier_exposure_loss, lambda torch, f: -(f.mean(1) - torch.logsumexp(f, dim=1)), _logits(9)
    )


@pytest.mark.parametrize(("m_in", "m_out"), [(-8.0, -3.0), (-23.0, -5.0), (0.0, -30.0)])
def test_energy_bounded_loss_and_its_gradients_agree_with_the_official_code(m_in, m_out):
    torch = pytest.importorskip("torch")
    logits_in, logits_out, labels = _logits(5), _logits(11, seed=1), _labels(5)

    x = torch.tensor(np.concatenate([logits_in, logits_out]), requires_grad=True)  # one forward, ID first
    loss = torch.nn.functional.cross_entropy(x[:5], torch.tensor(labels).long())
    ec_out, ec_in = -torch.logsumexp(x[5:], dim=1), -torch.logsumexp(x[:5], dim=1)
    relu = torch.nn.functional.relu
    hinge = torch.pow(relu(ec_in - m_in), 2).mean() + torch.pow(relu(m_out - ec_out), 2).mean()
    loss = loss + 0.1 * hinge
    loss.backward()

    (value, aux), gradients = BOUNDED(logits_in, labels, logits_out, m_in=m_in, m_out=m_out)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(np.concatenate(gradients), x.grad, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(aux["hinge"], hinge.item(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(aux["energy_in"], ec_in.mean().item(), rtol=1e-5)
    np.testing.assert_allclose(aux["energy_out"], ec_out.mean().item(), rtol=1e-5)
    np.testing.assert_allclose(aux["active_in"], (ec_in > m_in).float().mean().item(), rtol=1e-6)
    np.testing.assert_allclose(aux["active_out"], (ec_out < m_out).float().mean().item(), rtol=1e-6)


def test_log_softmax_maximum_is_the_energy_of_the_shifted_logits():
    logits, of = _logits(20), jax.jit(energy)
    log_msp = np.log(-jax.jit(maximum_softmax_probability)(logits))
    np.testing.assert_allclose(log_msp, of(logits) + logits.max(-1), atol=1e-5)
    np.testing.assert_allclose(log_msp, of(logits - logits.max(-1, keepdims=True)), atol=1e-5)


def test_energy_of_a_large_temperature_is_the_mean_logit_and_half_the_variance_over_it():
    logits, t = _logits(20), 1000.0
    limit = -(t * np.log(7) + logits.mean(-1) + logits.var(-1) / (2 * t))
    np.testing.assert_allclose(jax.jit(energy)(logits, t), limit, atol=2e-3)  # float32 spacing 2.4e-4


def test_energy_can_be_positive():
    assert GRADIENTS[energy](jnp.full(3, -5.0))[0] > 0


@pytest.mark.parametrize(
    ("score", "logits", "expected"),
    [
        (energy, [1e4, 0, 0], -1e4),
        (energy, [-1e4, -1e4, -1e4], 1e4 - np.log(3)),
        (energy, [0, -np.inf, -np.inf], 0),
        (energy, [-np.inf, -np.inf, -np.inf], np.inf),
        (maximum_softmax_probability, [1e4, 0, 0], -1),
        (maximum_softmax_probability, [1e4, 1e4, -np.inf], -0.5),
        (max_logit, [1e4, -np.inf, 0], -1e4),
        (outlier_exposure_loss, [1e4, 1e4, 1e4], np.log(3)),
        (outlier_exposure_loss, [3e4, 0, 0], 2e4),
        (outlier_exposure_loss, [0, 0, -np.inf], np.inf),
    ],
)
def test_values_and_gradients_at_the_edge(score, logits, expected):
    value, gradient = GRADIENTS[score](np.float32(logits))
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)
    if np.isfinite(logits).any():
        assert np.isfinite(gradient).all()


def test_outlier_exposure_is_least_for_the_uniform_softmax():
    loss = jax.jit(outlier_exposure_loss)
    assert np.min(loss(_logits(50))) > np.log(7)
    np.testing.assert_allclose(loss(np.full((50, 7), -4.0)), np.log(7), rtol=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_a_score_reduces_the_last_axis_alone_alike_with_and_without_jit_and_vmap(score):
    logits = jnp.asarray(_logits(6)).reshape(2, 3, 7)
    plain = score(logits)
    assert plain.shape == (2, 3)
    np.testing.assert_allclose(jax.jit(score)(logits), plain, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(score)))(logits), plain, rtol=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_low_precision_logits_are_reduced_in_float32(score):
    logits = jnp.asarray(_logits(6), jnp.bfloat16)
    values = jax.jit(score)(logits)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, jax.jit(score)(np.asarray(logits, np.float32)), rtol=1e-6)


def test_the_ratio_of_the_batches_has_no_effect():
    logits_in, logits_out = _logits(4), _logits(6, seed=1)
    once, _ = HINGE(logits_in, logits_out, m_in=-9.0, m_out=-2.0)
    thrice, _ = HINGE(logits_in, np.tile(logits_out, (3, 1)), m_in=-9.0, m_out=-2.0)
    np.testing.assert_allclose(once, thrice, rtol=1e-6)


def test_energies_beyond_their_margins_cost_nothing():
    low, high = np.full((3, 2), 30.0), np.zeros((3, 2))  # energies -30.7 and -0.7
    loss, aux = HINGE(low, high, m_in=-23.0, m_out=-5.0)
    assert (loss, aux["active_in"], aux["active_out"]) == (0, 0, 0)
    loss, aux = HINGE(high, low, m_in=-23.0, m_out=-5.0)
    expected = (23 - np.log(2)) ** 2 + (25 + np.log(2)) ** 2
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert (aux["active_in"], aux["active_out"]) == (1, 1)


def test_masked_rows_change_neither_value_nor_gradient():
    logits_in, labels, logits_out = _logits(8), _labels(8), _logits(11, seed=1)
    margins = {"m_in": -9.0, "m_out": -2.0}
    short, (short_gradient, _) = BOUNDED(logits_in[:5], labels[:5], logits_out, **margins)
    mask = np.arange(8) < 5
    padded, (padded_gradient, _) = BOUNDED(logits_in, labels, logits_out, mask_in=mask, **margins)
    chex.assert_trees_all_close(padded, short, rtol=1e-6)
    np.testing.assert_allclose(padded_gradient[:5], short_gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(padded_gradient[5:], 0)


def test_a_fully_masked_batch_leaves_the_outliers_term():
    f_in, f_out = _logits(3), _logits(4, seed=1)
    loss, aux = HINGE(f_in, f_out, m_in=-9.0, m_out=-2.0, mask_in=np.zeros(3, bool))
    energy_out = -np.log(np.exp(f_out).sum(-1))
    np.testing.assert_allclose(loss, np.mean(np.maximum(0, -2 - energy_out) ** 2), rtol=1e-5)
    assert aux["energy_in"] == 0


def test_proposed_margins_lie_outside_the_mean_energies():
    assert propose_margins(-10.9, -6.4) == pytest.approx((-12.9, -4.4))
    assert propose_margins(jnp.float32(-6), np.float32(-8), slack=3) == pytest.approx((-9, -5))


@pytest.mark.parametrize(
    ("mean_in", "mean_out", "slack"),
    [(-4.0, -8.0, 2.0), (-4.0, -9.0, 2.0), (-9.0, -4.0, -3.0), (np.nan, -4.0, 2.0), (-np.inf, -4.0, 2.0)],
)
def test_margins_that_would_invert_are_refused(mean_in, mean_out, slack):
    with pytest.raises(UserError, match=f"slack: with {slack} the margins would be m_in="):
        propose_margins(mean_in, mean_out, slack)
