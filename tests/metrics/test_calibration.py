import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.metrics.calibration import expected_calibration_error


def _bin_by_bin(confidence: np.ndarray, correct: np.ndarray, num_bins: int) -> float:
    edges, error = np.linspace(0, 1, num_bins + 1, dtype=np.float32), 0.0
    for low, high in itertools.pairwise(edges):
        rows = (confidence > low) & (confidence <= high)
        if rows.any():
            error += rows.mean() * abs(correct[rows].mean() - confidence[rows].mean(dtype=np.float64))
    return error


@pytest.mark.parametrize("num_bins", [10, 15])
def test_equals_a_loop_over_bins_with_and_without_padding(num_bins):
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.25, 1, 300).astype(np.float32)
    confidence[:60] = np.linspace(0, 1, num_bins + 1, dtype=np.float32)[rng.integers(1, num_bins + 1, 60)]
    correct = rng.uniform(size=300) < confidence**2
    mask = np.arange(300) < 250
    function = jax.jit(expected_calibration_error, static_argnames="num_bins")
    full = function(confidence, correct, num_bins=num_bins)
    np.testing.assert_allclose(full, _bin_by_bin(confidence, correct, num_bins), atol=1e-6)
    part = function(confidence, correct, num_bins=num_bins, mask=mask)
    np.testing.assert_allclose(part, _bin_by_bin(confidence[:250], correct[:250], num_bins), atol=1e-6)


def test_an_edge_belongs_to_the_bin_below():
    confidence, correct = jnp.asarray([0.5, 0.75]), jnp.asarray([True, False])
    # (0, 1/2] and (1/2, 1] hold one each: the errors 0.5 and -0.75 do not cancel, as they would in one bin.
    np.testing.assert_allclose(expected_calibration_error(confidence, correct, num_bins=2), 1.25 / 2)
    np.testing.assert_allclose(expected_calibration_error(confidence, correct, num_bins=1), 0.25 / 2)


def test_extremes():
    assert expected_calibration_error(jnp.ones(3), jnp.ones(3, bool)) == 0
    assert expected_calibration_error(jnp.ones(3), jnp.zeros(3, bool)) == 1
    assert expected_calibration_error(jnp.zeros(3), jnp.ones(3, bool)) == 1
    assert expected_calibration_error(jnp.ones(3), jnp.ones(3, bool), mask=jnp.zeros(3, bool)) == 0
