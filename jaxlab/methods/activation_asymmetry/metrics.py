"""How asymmetric, saturated and sparse the channels of a layer are.

Kim, Kim & Kim, *Tanh Works Better With Asymmetry*, NeurIPS 2023, look at single channels, in which an
asymmetry shows that the whole layer averages out. The definitions are this project's own: the paper's could
not be read.

Every function takes activations [..., C], C channels of R = the product of all other axes values each, and
computes in at least float32. All moments are those of the population (divided by R).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlab.core import UserError

_CONSTANT = 1e-12  # a channel with a variance below this is constant: fully saturated


class Moments(NamedTuple):
    """Count of values, mean, and sums of squared and cubed deviations from it; [C], the count a scalar."""

    count: jax.Array
    mean: jax.Array
    m2: jax.Array
    m3: jax.Array


def channel_skewness(a: jax.Array) -> jax.Array:
    """m3 / m2^(3/2) of each channel, [..., C] -> [C]; 0 where `is_constant`."""
    return moments_finalize(_moments(_rows(a)))["skewness"]


def is_constant(a: jax.Array) -> jax.Array:
    """Whether a channel has next to no variance (1e-12), [..., C] -> [C] bool; its skewness means nothing."""
    return ~moments_finalize(_moments(_rows(a)))["valid"]


def channel_saturation(a: jax.Array, bound: float) -> jax.Array:
    """mean |a| / bound of each channel, [..., C] -> [C], in [0, 1].

    Args:
      a: outputs of an activation within [-bound, bound].
      bound: its bound.
    """
    _check_bound(bound)
    return jnp.mean(jnp.abs(_rows(a)), axis=0) / bound


def histogram_saturation(a: jax.Array, bins: int, bound: float) -> jax.Array:
    """φ_B: the mean of each bin's |mean value|, weighted by its count, over bound, [..., C] -> [C].

    Rakitianskaia & Engelbrecht, *Measuring Saturation in Neural Networks*, 2015 (from memory). .5 for uniform
    values, 1 for saturated ones. Only in the bin around 0 do values have both signs: an even number of bins
    has none, and φ_B is `channel_saturation`.

    Args:
      a: outputs of an activation within [-bound, bound].
      bins: B, the number of equal bins of [-bound, bound].
      bound: the activation's bound.
    """
    _check_bound(bound)
    if bins < 1:
        raise UserError(f"bins: expected 1 or more, got {bins}.")
    middle, outside = middle_bin_means(a, bins, bound)
    return (jnp.abs(middle) + outside) / bound


def middle_bin_means(a: jax.Array, bins: int, bound: float) -> tuple[jax.Array, jax.Array]:
    """What `histogram_saturation` is made of, and what batches can be averaged in, [..., C] -> twice [C].

    Returns:
      The sum of the values in the bin around 0 and the sum of the absolute values outside it, over R.
    """
    rows = _rows(a)
    half = bound / bins if bins % 2 else 0.0
    middle = (rows >= -half) & (rows < half)
    return (
        jnp.mean(jnp.where(middle, rows, 0.0), axis=0),
        jnp.mean(jnp.where(middle, 0.0, jnp.abs(rows)), axis=0),
    )


def asymmetric_saturation(
    a: jax.Array, bound: float, tau: float = 0.95
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Shares of values at either bound and how far they differ, [..., C] -> three times [C].

    Args:
      a: outputs of an activation within [-bound, bound].
      bound: its bound.
      tau: values from tau · bound on are saturated.

    Returns:
      The share at the upper bound, the share at the lower one, and |upper - lower|. The first two add up to
      the saturated share.
    """
    _check_bound(bound)
    if not 0 < tau <= 1:
        raise UserError(f"tau: expected a share of the bound in (0, 1], got {tau}.")
    rows = _rows(a)
    hi = jnp.mean(rows >= tau * bound, axis=0, dtype=rows.dtype)
    lo = jnp.mean(rows <= -tau * bound, axis=0, dtype=rows.dtype)
    return hi, lo, jnp.abs(hi - lo)


def mean_asymmetry(a: jax.Array, bound: float) -> jax.Array:
    """|mean a| / bound of each channel, [..., C] -> [C]: asymmetric saturation without a threshold."""
    _check_bound(bound)
    return jnp.abs(jnp.mean(_rows(a), axis=0)) / bound


def hoyer_sparsity(z: jax.Array) -> jax.Array:
    """(√R - Σ|z| / √Σz²) / (√R - 1) of each channel, [..., C] -> [C].

    Hoyer, *Non-negative Matrix Factorization with Sparseness Constraints*, JMLR 2004. 0: all values are
    equally large (or all 0); 1: a single one is not 0.

    Raises:
      UserError: a channel has fewer than two values.
    """
    rows = _rows(z)
    if len(rows) < 2:
        raise UserError(f"activations: sparsity needs two values a channel, got {len(rows)}.")
    return hoyer_of_means(len(rows), jnp.mean(jnp.abs(rows), axis=0), jnp.mean(jnp.square(rows), axis=0))


def hoyer_of_means(count: int | jax.Array, mean_absolute: jax.Array, mean_square: jax.Array) -> jax.Array:
    """`hoyer_sparsity` from the means [C] of |z| and of z² over `count` values a channel, two or more."""
    # The square root of what is divided by has no gradient at 0.
    rms = jnp.sqrt(jnp.where(mean_square > 0, mean_square, 1.0))
    root = jnp.sqrt(count)
    return jnp.where(mean_square > 0, root * (1 - mean_absolute / rms) / (root - 1), 0.0)


def near_zero_fraction(z: jax.Array, delta: float | jax.Array, relative: bool = False) -> jax.Array:
    """Share of values with |z| < delta in each channel, [..., C] -> [C]. Zero itself is always near zero.

    Args:
      z: what the next layer receives.
      delta: δ, one or one a channel. Batch normalisation moves a channel that is saturated at one bound with
        a share of .95 to .23 and -4.36: δ ≤ .1 misses its small values.
      relative: δ is in units of the channel's root mean square.
    """
    rows = _rows(z)
    limit = delta * jnp.sqrt(jnp.mean(jnp.square(rows), axis=0)) if relative else delta
    return jnp.mean((jnp.abs(rows) < limit) | (rows == 0), axis=0, dtype=rows.dtype)


def layer_mean(metric: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """The mean over channels, [C] -> scalar, of those that are valid (all if None); 0 where none is."""
    if valid is None:
        valid = jnp.ones_like(metric, dtype=bool)
    return jnp.sum(jnp.where(valid, metric, 0.0)) / jnp.maximum(jnp.sum(valid), 1)


def moments_init(num_channels: int) -> Moments:
    """The moments of no values."""
    zeros = jnp.zeros(num_channels, jnp.float32)
    return Moments(jnp.zeros((), jnp.float32), zeros, zeros, zeros)


def moments_update(moments: Moments, a: jax.Array) -> Moments:
    """Takes in a batch [..., C]."""
    return moments_merge(moments, _moments(_rows(a)))


def moments_merge(one: Moments, other: Moments) -> Moments:
    """The moments of two sets of values together, such as those of two devices.

    Exact, and without the cancellation of raw moments: Chan, Golub & LeVeque, 1979, for the mean and the
    second; Pébay, Sandia report SAND2008-6212, equation 2.1 with p = 3, for the third.
    """
    count = one.count + other.count
    n = jnp.maximum(count, 1)
    share_one, share_other = one.count / n, other.count / n
    delta = other.mean - one.mean
    m2 = one.m2 + other.m2 + jnp.square(delta) * one.count * share_other
    m3 = (
        one.m3
        + other.m3
        + delta**3 * one.count * share_other * (share_one - share_other)
        + 3 * delta * (share_one * other.m2 - share_other * one.m2)
    )
    return Moments(count, one.mean + delta * share_other, m2, m3)


def moments_finalize(moments: Moments) -> dict[str, jax.Array]:
    """`mean`, `variance` and `skewness` of each channel, [C], and `valid`: it varies (by more than 1e-12).

    The skewness of a channel that does not is 0.
    """
    n = jnp.maximum(moments.count, 1)
    variance = moments.m2 / n
    valid = variance >= _CONSTANT
    # The square root of what is divided by has no gradient at 0.
    deviation = jnp.sqrt(jnp.where(valid, variance, 1.0))
    skewness = jnp.where(valid, moments.m3 / n / deviation**3, 0.0)
    return {"mean": moments.mean, "variance": variance, "skewness": skewness, "valid": valid}


def _rows(a: jax.Array) -> jax.Array:
    a = jnp.asarray(a)
    a = a.astype(jnp.promote_types(a.dtype, jnp.float32))
    rows = a.reshape(-1, a.shape[-1])
    if len(rows) == 0:
        raise UserError(f"activations: no values in an array of shape {a.shape}.")
    return rows


def _moments(rows: jax.Array) -> Moments:
    """In two passes: raw moments of a saturated channel (±1, variance 1e-6) cancel in float32."""
    mean = jnp.mean(rows, axis=0)
    deviation = rows - mean
    rounded_away = jnp.mean(deviation, axis=0)
    mean, deviation = mean + rounded_away, deviation - rounded_away
    count = jnp.asarray(len(rows), rows.dtype)
    return Moments(count, mean, jnp.sum(deviation**2, axis=0), jnp.sum(deviation**3, axis=0))


def _check_bound(bound: float) -> None:
    if not 0 < bound < math.inf:
        raise UserError(f"bound: expected the activation's, a positive number, got {bound}.")
