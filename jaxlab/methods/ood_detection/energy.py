"""Energy-based out-of-distribution detection.

Weitang Liu, Xiaoyun Wang, John D. Owens, Yixuan Li. *Energy-based Out-of-distribution Detection*. NeurIPS
2020 (arXiv 2010.03759). Official code: wetliu/energy_ood, built on hendrycks/outlier-exposure.

The free energy of a classifier's logits, E(x) = -log Σ_c exp f_c(x), is -log p(x) up to a constant under
the density that the classifier implicitly defines. It is a score of any trained classifier, and what a
squared hinge shapes when the classifier is fine-tuned with auxiliary outliers.

Every score here is **larger for OOD examples**, as the energy itself is. The paper writes scores as
confidences (-E, max softmax); the official code keeps them as here and negates them before the metrics.
Where the paper and its code differ: Section 4.1 of the paper swaps the grids of the two margins, and the
default margins of the code's arguments, -25 and -7, are not the reported ones (-23 for CIFAR-10 and -27
for CIFAR-100, with -5), which its script sets.
"""

import math
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jaxlab.core import Batch, Method, Network, Outputs, UserError, Variables
from jaxlab.core.updates import gradient_update
from jaxlab.metrics.classification import correct, negative_log_likelihood
from jaxlab.metrics.reductions import masked_mean


def at_least_float32(values: jax.Array) -> jax.Array:
    """What a score computes in: the dtype of the values, but no narrower than float32."""
    return jnp.asarray(values, jnp.promote_types(jnp.asarray(values).dtype, jnp.float32))


def energy(logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Free energy, -T log Σ_c exp(f_c / T), Section 2; [..., C] -> [...], float32 or wider.

    It is positive where all logits are very negative. As T grows it tends to -T log C - mean_c f_c.
    """
    return -temperature * jax.nn.logsumexp(at_least_float32(logits) / temperature, axis=-1)


def maximum_softmax_probability(logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """-max_c softmax(f / T)_c, the baseline of Hendrycks & Gimpel, ICLR 2017; [..., C] -> [...].

    Its logarithm is the energy of f - max_c f_c: two terms that move apart in training. Confident
    examples tie at exactly -1.
    """
    return -jnp.max(jax.nn.softmax(at_least_float32(logits) / temperature), axis=-1)


def max_logit(logits: jax.Array) -> jax.Array:
    """-max_c f_c, which the energy nears as the prediction grows certain; [..., C] -> [...]."""
    return -jnp.max(at_least_float32(logits), axis=-1)


def energy_hinge(
    logits_in: jax.Array,
    logits_out: jax.Array,
    m_in: float,
    m_out: float,
    mask_in: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared hinges that push the energies of both kinds of example apart, Section 3.3.

    mean_in max(0, E_in - m_in)² + mean_out max(0, m_out - E_out)². The means are taken apart, so the
    ratio of the two batch sizes has no effect.

    Args:
      logits_in: [B, C] of in-distribution examples.
      logits_out: [M, C] of auxiliary outliers.
      m_in: the energy that in-distribution examples should stay below; m_in < m_out.
      m_out: the energy that outliers should stay above.
      mask_in: [B] bool, false for rows that only fill up the batch; all are real if not given.

    Returns:
      The scalar, and the mean energies `energy_in` and `energy_out` with the fractions of examples on the
      wrong side of their margin, `active_in` and `active_out`.
    """
    chex.assert_rank([logits_in, logits_out], 2)
    energy_in, energy_out = energy(logits_in), energy(logits_out)
    excess_in, excess_out = jax.nn.relu(energy_in - m_in), jax.nn.relu(m_out - energy_out)
    aux = {
        "energy_in": masked_mean(energy_in, mask_in),
        "energy_out": energy_out.mean(),
        "active_in": masked_mean(excess_in > 0, mask_in),
        "active_out": jnp.mean(excess_out > 0),
    }
    return masked_mean(excess_in**2, mask_in) + jnp.mean(excess_out**2), aux


def energy_bounded_loss(
    logits_in: jax.Array,
    labels_in: jax.Array,
    logits_out: jax.Array,
    m_in: float,
    m_out: float,
    mask_in: jax.Array | None = None,
    weight: float = 0.1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy plus `weight` times `energy_hinge`, Section 3.3. Gradients flow through both hinges.

    Args:
      labels_in: [B] integers.
      weight: λ; 0.1 throughout the paper.
      logits_in, logits_out, m_in, m_out, mask_in: as for `energy_hinge`.

    Returns:
      The scalar, and what `energy_hinge` returns beside it with the terms `cross_entropy` and `hinge`.
    """
    cross_entropy = masked_mean(negative_log_likelihood(logits_in, labels_in), mask_in)
    hinge, aux = energy_hinge(logits_in, logits_out, m_in, m_out, mask_in)
    return cross_entropy + weight * hinge, {"cross_entropy": cross_entropy, "hinge": hinge, **aux}


def propose_margins(mean_in: float, mean_out: float, slack: float = 2.0) -> tuple[float, float]:
    """Margins for `energy_hinge` that lie around the mean energies of a classifier before fine-tuning.

    The published margins fit the published networks: on another they wreck its accuracy.

    Args:
      mean_in: the mean energy of in-distribution examples.
      mean_out: the mean energy of auxiliary outliers.
      slack: how far outside the means the margins lie.

    Returns:
      `m_in`, which is `mean_in` less the slack, and `m_out`, which is `mean_out` plus the slack.

    Raises:
      UserError: `m_in` would not be below `m_out`, or one of them is not finite.
    """
    m_in, m_out = float(mean_in) - slack, float(mean_out) + slack
    if not -math.inf < m_in < m_out < math.inf:
        raise UserError(
            f"slack: with {slack} the margins would be m_in={m_in:g} and m_out={m_out:g}, not in that order;"
            " take a larger slack, or outliers that the classifier gives a higher mean energy."
        )
    return m_in, m_out


def outlier_exposure_loss(logits_out: jax.Array) -> jax.Array:
    """Cross-entropy from the uniform distribution to the softmax, [..., C] -> [...]; at least log C.

    The rival fine-tuning: Hendrycks, Mazeika & Dietterich, *Deep Anomaly Detection with Outlier Exposure*,
    ICLR 2019, which adds 0.5 times its mean to the cross-entropy.
    """
    return -jnp.mean(jax.nn.log_softmax(at_least_float32(logits_out)), axis=-1)


class FineTuneState(NamedTuple):
    """Variables of the network, the optimizer's state, and the margins that were set at the start."""

    variables: Variables
    opt_state: optax.OptState
    margin_in: jax.Array
    margin_out: jax.Array


def fine_tune(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    auxiliary_loss: Literal["energy", "outlier_exposure"] = "energy",
    weight: float | None = None,
    margin_in: float | None = None,
    margin_out: float | None = None,
    margin_slack: float = 2.0,
) -> Method:
    """Fine-tunes a converged classifier with auxiliary outliers, Section 3.3.

    A batch is {"image": [B, ...], "label": [B], "auxiliary": {"image": [M, ...]}}. Both kinds of example
    go through the network together, in-distribution ones first, so that batch statistics are those of the
    mixture.

    Args:
      network: started from the variables of a pre-trained classifier.
      optimizer: what turns the gradient into a move.
      auxiliary_loss: what is added to the cross-entropy: the energy hinges, or Outlier Exposure.
      weight: of the auxiliary loss; None: 0.1 for energy, 0.5 for Outlier Exposure, as published.
      margin_in: E_in should be below it. None: the mean energy of the first batch before fine-tuning,
        less `margin_slack`.
      margin_out: E_out should be above it. None: likewise the mean energy of its outliers, plus
        `margin_slack`.
      margin_slack: how far outside the mean energies the measured margins lie.

    Metrics: `loss`, its terms, `accuracy`, and for the energy loss the mean energies with the fractions of
    examples on the wrong side of their margins.

    Raises:
      UserError: the margins are not in order.
    """
    if margin_in is not None and margin_out is not None and not margin_in < margin_out:
        raise UserError(f"margin_in: {margin_in} is not below margin_out={margin_out}; exchange them.")
    if weight is None:
        weight = {"energy": 0.1, "outlier_exposure": 0.5}[auxiliary_loss]

    def init(key: chex.PRNGKey, batch: Batch) -> FineTuneState:
        variables = network.init(key, batch["image"])

        def mean_energy(image: jax.Array) -> jax.Array:
            return jnp.mean(energy(network.apply(variables, image, train=False)[0]["logits"]))

        low, high = margin_in, margin_out
        if low is None:
            low = mean_energy(batch["image"]) - margin_slack
        if high is None:
            high = mean_energy(batch["auxiliary"]["image"]) + margin_slack
        margins = jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)
        return FineTuneState(variables, optimizer.init(variables["params"]), *margins)

    def update(
        state: FineTuneState, batch: Batch, key: chex.PRNGKey
    ) -> tuple[FineTuneState, dict[str, jax.Array]]:
        images = jnp.concatenate([batch["image"], batch["auxiliary"]["image"]])
        count_in = len(batch["image"])

        def loss(variables: Variables) -> tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]:
            outputs, variables = network.apply(variables, images, train=True, key=key)
            logits_in, logits_out = outputs["logits"][:count_in], outputs["logits"][count_in:]
            if auxiliary_loss == "energy":
                value, metrics = energy_bounded_loss(
                    logits_in,
                    batch["label"],
                    logits_out,
                    state.margin_in,
                    state.margin_out,
                    weight=weight,
                )
            else:
                cross_entropy = jnp.mean(negative_log_likelihood(logits_in, batch["label"]))
                exposure = jnp.mean(outlier_exposure_loss(logits_out))
                value = cross_entropy + weight * exposure
                metrics = {"cross_entropy": cross_entropy, "outlier_exposure": exposure}
            accuracy = jnp.mean(correct(logits_in, batch["label"]))
            return value, (variables, {"accuracy": accuracy, **metrics})

        variables, opt_state, metrics = gradient_update(loss, optimizer, state.variables, state.opt_state)
        return state._replace(variables=variables, opt_state=opt_state), metrics

    def predict(state: FineTuneState, batch: Batch) -> Outputs:
        return network.apply(state.variables, batch["image"], train=False)[0]

    return Method(init, update, predict)


def cosine_schedule(init_value: float, decay_steps: int, final_value: float = 1e-6) -> optax.Schedule:
    """The cosine from `init_value` to `final_value` of the official code, which is one step ahead.

    It moves on before the optimizer does: update number k = 1..N uses factor k, so that the full rate is
    never used and the last update has `final_value`. Optax counts updates from 0.
    """
    cosine = optax.cosine_decay_schedule(init_value, decay_steps, alpha=final_value / init_value)
    return lambda count: cosine(count + 1)
