"""Out-of-distribution detection that reshapes the features, or the weights, of a classifier's last layer.

ReAct, VRA, ASH and SCALE transform features [..., D], which must not be negative, DICE masks the weights;
from either follow new logits, and any score of logits can follow. Their authors take the energy, and so do
the `*_score` here. All scores are **larger for OOD examples**, fitted ones have
`fit_*(features, logits, labels, head, ...) -> state`, a dict of arrays, and
`*_score(state, features, logits) -> [B]`.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxlab.core import UserError
from jaxlab.methods.ood_detection.energy import at_least_float32, energy
from jaxlab.methods.ood_detection.logit_scores import Head, ScoreState


def linear(features: jax.Array, head: Head) -> jax.Array:
    """The logits of features, [..., D] -> [..., C], in full float32."""
    kernel, bias = head
    return jnp.matmul(at_least_float32(features), kernel, precision="highest") + bias


def rectify(
    features: jax.Array,
    high: float | jax.Array,
    low: float | jax.Array | None = None,
    below: Literal["clip", "zero"] = "clip",
) -> jax.Array:
    """Features that are at most `high` and, where below `low`, either `low` or 0; [..., D] -> [..., D]."""
    rectified = jnp.minimum(at_least_float32(features), high)
    if low is None:
        return rectified
    return jnp.where(features < low, low if below == "clip" else 0, rectified)


def fit_react(
    features: jax.Array, logits: jax.Array, labels: jax.Array, head: Head, *, percentile: float = 90
) -> ScoreState:
    """The percentile of all entries of the features, interpolated linearly.

    Sun, Guo & Li, *ReAct: Out-of-distribution Detection With Rectified Activations*, NeurIPS 2021, whose code
    takes it over about 2,000 in-distribution validation images; others take training features.

    Args:
      features: [N, D].
      logits, labels: not used.
      head: of the network.
      percentile: of the N·D entries, in [0, 100].

    Returns:
      `high`, with the head as `kernel` and `bias`.

    Raises:
      UserError: `percentile` is out of range.
    """
    (high,) = _percentiles(features, percentile)
    return {"high": high, "kernel": head[0], "bias": head[1]}


def react_score(state: ScoreState, features: jax.Array, logits: jax.Array) -> jax.Array:
    """Energy of the logits of features clipped at `high`, [B, D] -> [B]; the logits [B, C] are not used."""
    return energy(linear(rectify(features, state["high"]), (state["kernel"], state["bias"])))


def fit_vra(
    features: jax.Array,
    logits: jax.Array,
    labels: jax.Array,
    head: Head,
    *,
    percentile_low: float = 10,
    percentile_high: float = 90,
) -> ScoreState:
    """Two percentiles of all entries of the features, interpolated linearly.

    Xu, Lian, Liu & Tao, *VRA: Variational Rectified Activation for Out-of-distribution Detection*,
    NeurIPS 2023.

    Args:
      features, logits, labels, head: as for `fit_react`.
      percentile_low, percentile_high: in order, in [0, 100]; the defaults are OpenOOD's, which takes them
        over validation data.

    Returns:
      `low` and `high`, with the head as `kernel` and `bias`.

    Raises:
      UserError: the percentiles are out of range or order.
    """
    low, high = _percentiles(features, percentile_low, percentile_high)
    return {"low": low, "high": high, "kernel": head[0], "bias": head[1]}


def vra_score(
    state: ScoreState, features: jax.Array, logits: jax.Array, *, below: Literal["clip", "zero"] = "clip"
) -> jax.Array:
    """Energy of the logits of features rectified on both sides, [B, D] -> [B].

    Args:
      below: what features below `low` become: `low` (OpenOOD, pytorch-ood), or 0 (the paper and its code).
      logits: not used.
    """
    rectified = rectify(features, state["high"], state["low"], below)
    return energy(linear(rectified, (state["kernel"], state["bias"])))


def ash(features: jax.Array, percentile: float = 90, variant: Literal["p", "s", "b"] = "s") -> jax.Array:
    """Keeps the largest features of each example and makes up for the others, [..., D] -> [..., D].

    Djurisic, Bozanic, Ashok & Liu, *Extremely Simple Activation Shaping for Out-of-Distribution Detection*,
    ICLR 2023. The authors run variant "s" at 95 on CIFAR and at 90 on ImageNet, OpenOOD "b" at 90.

    Args:
      features: not negative; of equal ones the first are kept.
      percentile: of the features that become 0, in [0, 100]; D·percentile/100 is rounded half to even.
      variant: "p": kept features stay as they are; "s": they are multiplied by exp(s1/s2), where s1 and s2
        are the sums of the features before and after pruning; "b": they all become s1 / their number. Where
        all features are 0, they stay 0 (in the authors' code they become NaN for "s").

    Raises:
      UserError: an unknown variant; `percentile` is out of range, or leaves no feature.
    """
    features = at_least_float32(features)
    largest, places = _largest(features, percentile)
    if variant == "s":
        kept = largest * _sharpening(features, largest)
    elif variant == "b":
        kept = jnp.broadcast_to(features.sum(-1, keepdims=True) / largest.shape[-1], largest.shape)
    elif variant == "p":
        kept = largest
    else:
        raise UserError(f"variant: expected 'p', 's' or 'b', got {variant!r}.")
    return jnp.put_along_axis(jnp.zeros_like(features), places, kept, axis=-1, inplace=False)


def scale(features: jax.Array, percentile: float = 85) -> jax.Array:
    """Multiplies features by exp(s1/s2), with the sums as in `ash`, and prunes none; [..., D] -> [..., D].

    Xu, Chen, Franchi & Yao, *Scaling for Training Time and Post-hoc Out-of-distribution Detection
    Enhancement*, ICLR 2024.

    Raises:
      UserError: `percentile` is out of range, or leaves no feature.
    """
    features = at_least_float32(features)
    largest, _ = _largest(features, percentile)
    return features * _sharpening(features, largest)


def fit_dice(
    features: jax.Array, logits: jax.Array, labels: jax.Array, head: Head, *, percentile: float = 90
) -> ScoreState:
    """The head without its weights of least mean contribution, mean(h_d) W_dc.

    Sun & Li, *DICE: Leveraging Sparsification for Out-of-Distribution Detection*, ECCV 2022.

    Args:
      features: [N, D] of training data.
      logits, labels: not used.
      head: of the network.
      percentile: of the D·C contributions, interpolated linearly, above which a weight is kept.

    Returns:
      `kernel` and `bias` of the sparse head.

    Raises:
      UserError: `percentile` is out of range.
    """
    kernel, bias = head
    contributions = jnp.mean(at_least_float32(features), axis=0)[:, None] * kernel
    (threshold,) = _percentiles(contributions, percentile)
    return {"kernel": jnp.where(contributions > threshold, kernel, 0), "bias": bias}


def dice_score(state: ScoreState, features: jax.Array, logits: jax.Array) -> jax.Array:
    """Energy of the logits of the sparse head, [B, D] -> [B]; the logits [B, C] are not used."""
    return energy(linear(features, (state["kernel"], state["bias"])))


def check_percentiles(*percentiles: float) -> None:
    """Refuses percentiles out of [0, 100] or out of order with a `UserError`."""
    if list(percentiles) != sorted(percentiles) or not all(0 <= p <= 100 for p in percentiles):
        raise UserError(
            f"percentile: expected 0 to 100, in ascending order, got {', '.join(map(str, percentiles))}."
        )


def _percentiles(values: jax.Array, *percentiles: float) -> list[jax.Array]:
    """As `numpy.percentile` of all entries. That of JAX has float32 ranks: too coarse for 10^6 entries."""
    check_percentiles(*percentiles)
    ordered = _sort(at_least_float32(values).ravel())
    found = []
    for percentile in percentiles:
        rank = percentile / 100 * (ordered.size - 1)
        below = ordered[math.floor(rank)]
        above = ordered[math.ceil(rank)]
        found.append(below + (above - below) * (rank - math.floor(rank)))
    return found


def _sort(values: jax.Array) -> jax.Array:
    """Ascending. As integers of the same order, which XLA sorts five times as fast on a CPU as floats."""
    integers = jnp.dtype(f"int{8 * values.dtype.itemsize}")
    largest = jnp.iinfo(integers).max

    def flip(bits: jax.Array) -> jax.Array:
        return jnp.where(bits < 0, bits ^ largest, bits)  # negative floats grow where their bits fall

    bits = jax.lax.bitcast_convert_type(values, integers)
    return jax.lax.bitcast_convert_type(flip(jnp.sort(flip(bits))), values.dtype)


def _largest(features: jax.Array, percentile: float) -> tuple[jax.Array, jax.Array]:
    """The features that pruning keeps and their places, [..., D] -> [..., k] each."""
    check_percentiles(percentile)
    size = features.shape[-1]
    kept = size - round(size * percentile / 100)
    if kept < 1:
        raise UserError(f"percentile: {percentile} leaves none of {size} features; take a lower one.")
    return jax.lax.top_k(features, kept)


def _sharpening(features: jax.Array, largest: jax.Array) -> jax.Array:
    total, kept = features.sum(-1, keepdims=True), largest.sum(-1, keepdims=True)
    return jnp.exp(total / jnp.where(kept == 0, 1, kept))
