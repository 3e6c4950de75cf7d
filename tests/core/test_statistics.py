"""Mean and standard error are those of a sample, of the seeds that have a value."""

import math

import numpy as np
import pytest

from jaxlab.core.statistics import mean_and_stderr


def test_mean_and_stderr_are_those_of_a_sample():
    values = np.random.default_rng(0).normal(size=(5, 3))
    mean, stderr = mean_and_stderr(values)
    np.testing.assert_allclose(mean, np.mean(values, axis=0), rtol=1e-12)
    np.testing.assert_allclose(stderr, np.std(values, axis=0, ddof=1) / np.sqrt(5), rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "mean", "stderr"),
    [
        ([1.0, 3.0, math.nan], 2.0, 1.0),
        ([2.0, None], 2.0, math.nan),
        ([2.0], 2.0, math.nan),
        ([math.nan], math.nan, math.nan),
        ([], math.nan, math.nan),
    ],
)
def test_seeds_without_a_value_are_left_out(values, mean, stderr, recwarn):
    np.testing.assert_equal(mean_and_stderr(values), (np.asarray(mean), np.asarray(stderr)))
    assert not recwarn.list
