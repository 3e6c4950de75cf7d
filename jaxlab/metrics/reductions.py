"""How values per example become one figure."""

import chex
import jax
import jax.numpy as jnp


def masked_mean(values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The mean over the real rows of a padded batch; [B], [B] bool -> scalar, 0 where no row is real.

    Without a mask all rows are real.
    """
    if mask is None:
        return jnp.mean(values)
    chex.assert_equal_shape([values, mask])
    return jnp.sum(values, where=mask) / jnp.maximum(jnp.sum(mask), 1)
