"""Out-of-distribution scores of a classifier's logits and, where they move the input, of its gradient.

All are **larger for OOD examples**; their authors write most of them as confidences, of which these are the
negatives. Energy, maximum softmax probability and maximum logit stand in `energy.py`. Those that are fitted
have `fit_*(features, logits, labels, head, ...) -> state`, a dict of arrays, and
`*_score(state, features, logits) -> [B]`, as in `feature_scores.py`.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxlab.core import Variables
from jaxlab.methods.ood_detection.energy import (
    at_least_float32,
    maximum_softmax_probability,
    outlier_exposure_loss,
)
from jaxlab.metrics.classification import negative_log_likelihood

Head = tuple[jax.Array, jax.Array]  # kernel [D, C] and bias [C] of a network's last layer
ScoreState = dict[str, jax.Array]

_LARGEST_LOG_TEMPERATURE = 9.0  # temperatures are looked for within e^-9 and e^9
_HALVINGS = 30  # of that range, to float32's spacing of its logarithm


def entropy_score(logits: jax.Array) -> jax.Array:
    """Entropy of the softmax in nats, [..., C] -> [...]; between 0 and log C."""
    return -_sum_of_products(*_softmax(logits))


def uniform_xent_score(logits: jax.Array) -> jax.Array:
    """-(cross-entropy from uniform to softmax) = mean_c f_c - LSE(f), [..., C] -> [...]; at most -log C.

    The score that belongs to Outlier Exposure (Hendrycks, Mazeika & Dietterich, ICLR 2019; its code's flag
    `use_xent`).
    """
    return -outlier_exposure_loss(logits)


def gen_score(logits: jax.Array, gamma: float = 0.1, top_m: int = 100) -> jax.Array:
    """Generalized entropy Σ p^γ (1-p)^γ over the `top_m` largest probabilities, [..., C] -> [...].

    Liu, Lochman & Zach, *GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection*, CVPR 2023.
    """
    log_p = jax.nn.log_softmax(at_least_float32(logits))
    # A small γ makes p^γ (1-p)^γ so steep at 0 and 1 that p rounded to float32 is not enough: all is done in
    # logarithms, and 1-p of the likeliest class is the sum over the others.
    num_classes = log_p.shape[-1]
    likeliest = jax.nn.one_hot(jnp.argmax(log_p, axis=-1), num_classes, dtype=bool)
    log_rest = jax.nn.logsumexp(log_p, axis=-1, where=~likeliest, keepdims=True)
    log_q = jnp.where(likeliest, log_rest, jnp.log1p(-jnp.exp(jnp.where(likeliest, -1, log_p))))
    terms = jnp.exp(gamma * (log_p + log_q))
    if top_m < num_classes:
        terms = jnp.take_along_axis(terms, jax.lax.top_k(log_p, top_m)[1], axis=-1)
    return jnp.sum(terms, axis=-1)


def fit_temperature(features: jax.Array, logits: jax.Array, labels: jax.Array, head: Head) -> ScoreState:
    """The temperature at which the negative log-likelihood of the labels is least.

    Guo, Pleiss, Sun & Weinberger, *On Calibration of Modern Neural Networks*, ICML 2017, who fit it on
    in-distribution validation data. In 1/T the likelihood is concave: bisection on the sign of its derivative
    finds the minimum, where the authors' fixed number of L-BFGS steps may stop before it.

    Args:
      logits: [N, C].
      labels: [N] integers.
      features, head: not used.

    Returns:
      `temperature`, a scalar in [1e-4, 1e4]: at an end where every example is classified correctly, or the
      logits tell nothing.
    """
    logits = at_least_float32(logits)
    chex.assert_rank([logits, labels], [2, 1])
    of_label = jnp.take_along_axis(logits, labels[:, None], axis=-1)

    def halve(_, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        weights = jax.nn.softmax(logits * jnp.exp(-middle))
        # The derivative by 1/T. Differences first: large logits would cancel in a difference of means.
        too_cold = jnp.mean(_sum_of_products(weights, logits - of_label)) > 0
        return jnp.where(too_cold, middle, low), jnp.where(too_cold, high, middle)

    largest = jnp.asarray(_LARGEST_LOG_TEMPERATURE, logits.dtype)
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (-largest, largest))
    return {"temperature": jnp.exp((low + high) / 2)}


def temperature_score(state: ScoreState, features: jax.Array, logits: jax.Array) -> jax.Array:
    """Negative maximum softmax probability at the temperature of `fit_temperature`, [B, C] -> [B]."""
    return maximum_softmax_probability(logits, state["temperature"])


def fit_kl_matching(features: jax.Array, logits: jax.Array, labels: jax.Array, head: Head) -> ScoreState:
    """The mean softmax of the examples that are predicted to be of each class.

    Hendrycks, Basart, Mazeika et al., *Scaling Out-of-Distribution Detection for Real-World Settings*, ICML
    2022, who fit it on in-distribution validation data.

    Args:
      logits: [N, C].
      features, labels, head: not used; the predicted classes stand in for labels.

    Returns:
      `templates` [C, C]; a class that is never predicted has all its mass on itself.
    """
    p, _ = _softmax(logits)
    num_classes = p.shape[-1]
    predicted = jnp.argmax(p, axis=-1)
    counts = jnp.bincount(predicted, length=num_classes)[:, None]
    means = jax.ops.segment_sum(p, predicted, num_classes) / jnp.maximum(counts, 1)
    return {"templates": jnp.where(counts > 0, means, jnp.eye(num_classes, dtype=p.dtype))}


def kl_matching_score(state: ScoreState, features: jax.Array, logits: jax.Array) -> jax.Array:
    """min_c KL(p ‖ template_c), [B, C] -> [B]; infinite where p exceeds the support of every template."""
    p, log_p = _softmax(logits)
    templates = state["templates"]
    log_templates = jnp.log(jnp.where(templates > 0, templates, 1))
    cross = jnp.matmul(p, log_templates.T, precision="highest")
    beyond = jnp.matmul(p, (templates == 0).T.astype(p.dtype), precision="highest") > 0
    divergence = _sum_of_products(p, log_p)[:, None] - cross
    return jnp.min(jnp.where(beyond, jnp.inf, jnp.maximum(divergence, 0)), axis=-1)


def signed_step(
    loss: Callable[[jax.Array], jax.Array],
    inputs: jax.Array,
    epsilon: float,
    input_std: float | tuple[float, ...] = 1.0,
) -> jax.Array:
    """inputs - ε s(∂loss/∂inputs) / σ, where s is 1 for a gradient of zero or above, else -1.

    Args:
      loss: a scalar of the inputs, a sum of one term per example.
      inputs: [B, ..., channels], normalised.
      epsilon: ε, in units before normalisation.
      input_std: σ, by which each channel was divided.

    Returns:
      The moved inputs; they are not clipped.
    """
    # Terms of the gradient nearly cancel, so that a matrix product in less than float32 turns signs.
    with jax.default_matmul_precision("highest"):
        gradient = jax.grad(loss)(inputs)
    return inputs - epsilon * jnp.where(gradient >= 0, 1.0, -1.0) / jnp.asarray(input_std)


def odin_perturb(
    predict: Callable[[jax.Array], jax.Array],
    inputs: jax.Array,
    temperature: float = 1000.0,
    epsilon: float = 0.0014,
    input_std: float | tuple[float, ...] = 1.0,
) -> jax.Array:
    """Moves inputs against the gradient of the cross-entropy of their predicted class, as ODIN does.

    Args:
      predict: inputs -> logits [B, C], in evaluation mode and differentiable.
      inputs: [B, ..., channels].
      temperature: T, by which the logits are divided.
      epsilon, input_std: as for `signed_step`.
    """

    def loss(inputs: jax.Array) -> jax.Array:
        logits = predict(inputs)
        return jnp.sum(negative_log_likelihood(logits / temperature, jnp.argmax(logits, axis=-1)))

    return signed_step(loss, inputs, epsilon, input_std)


def odin_score(
    apply_fn: Callable[[Variables, jax.Array], jax.Array],
    variables: Variables,
    x: jax.Array,
    temperature: float = 1000.0,
    epsilon: float = 0.0014,
    input_std: float | tuple[float, ...] = 1.0,
) -> jax.Array:
    """-max softmax(f(x~) / T) of inputs that were moved by `odin_perturb`, [B, ...] -> [B].

    Liang, Li & Srikant, *Enhancing The Reliability of Out-of-distribution Image Detection in Neural
    Networks*, ICLR 2018. T and ε are chosen on validation outliers; the defaults are the usual ones.

    Args:
      apply_fn: `apply_fn(variables, x) -> logits` in evaluation mode.
      variables: of the network.
      x, temperature, epsilon, input_std: as for `odin_perturb`.
    """

    def predict(inputs: jax.Array) -> jax.Array:
        return apply_fn(variables, inputs)

    moved = odin_perturb(predict, x, temperature, epsilon, input_std)
    with jax.default_matmul_precision("highest"):
        return maximum_softmax_probability(predict(moved), temperature)


def _softmax(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    log_p = jax.nn.log_softmax(at_least_float32(logits))
    return jnp.exp(log_p), log_p


def _sum_of_products(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Σ_c w_c v_c, where a weight of 0 makes a term 0, whatever the value."""
    return jnp.sum(jnp.where(weights > 0, weights * values, 0), axis=-1)
