"""How far a classifier's confidence is from its accuracy (Guo et al., ICML 2017, arXiv 1706.04599)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np


def expected_calibration_error(
    confidence: jax.Array,
    correct: jax.Array,
    *,
    num_bins: int = 15,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Expected calibration error, Σ_b (n_b / n) |accuracy_b - confidence_b|, eq. 3 of the paper.

    Bin b of m holds the confidences in (b/m, (b+1)/m], as in the paper; the first holds 0 as well.

    Args:
      confidence: [B] probability of the predicted class, in [0, 1].
      correct: [B] bool, whether the prediction is right.
      num_bins: bins of equal width.
      mask: [B] bool, the rows to count; all if not given.

    Returns:
      A float32 scalar in [0, 1]; 0 where no row counts.
    """
    mask = jnp.ones_like(correct, dtype=bool) if mask is None else mask
    chex.assert_equal_shape([confidence, correct, mask])
    inner_edges = np.linspace(0, 1, num_bins + 1, dtype=np.float32)[1:-1]
    bins = jnp.searchsorted(inner_edges, confidence, side="left")
    # n_b cancels: (n_b / n) |hits_b / n_b - Σ confidence / n_b|. An empty bin adds nothing.
    gap = jnp.where(mask, correct - confidence.astype(jnp.float32), 0)
    gaps = jax.ops.segment_sum(gap, bins, num_bins)
    return jnp.abs(gaps).sum() / jnp.maximum(mask.sum(), 1)
