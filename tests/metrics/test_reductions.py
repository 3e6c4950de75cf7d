"""A padded batch has the mean of its real rows."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.metrics.reductions import masked_mean

VALUES = jnp.array([1.0, 2.0, 6.0, jnp.inf])


def test_rows_that_only_fill_up_do_not_count():
    mask = jnp.array([True, False, True, False])
    assert masked_mean(VALUES, mask) == 3.5
    np.testing.assert_array_equal(jax.grad(masked_mean)(VALUES, mask), [0.5, 0, 0.5, 0])


def test_no_mask_means_all_rows_and_no_row_means_zero():
    assert masked_mean(VALUES[:3]) == 3
    assert masked_mean(VALUES, jnp.zeros(4, bool)) == 0
