"""Mean and standard error over seeds, for every figure that is shown."""

import numpy as np
from numpy.typing import ArrayLike


def mean_and_stderr(values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over the seeds, in float64, leaving out those that have no value (NaN).

    Args:
      values: [seeds, ...].

    Returns:
      The mean [...] and s/√n with s the sample deviation (n - 1). The mean of no value and the standard
      error of fewer than two are NaN.
    """
    values = np.asarray(values, dtype=np.float64)
    present = ~np.isnan(values)
    count = present.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(present, values, 0.0).sum(axis=0) / count
        squares = np.where(present, (values - mean) ** 2, 0.0).sum(axis=0)
        return mean, np.sqrt(squares / (count - 1) / count)
