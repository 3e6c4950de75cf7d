"""Mean and standard error over seeds, for every figure that is shown."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def mean_and_stderr(values: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over the leading axis, in float64.

    Args:
      values: one entry a seed, each a number or a curve; all of one shape [...].

    Returns:
      Mean [...] and standard error [...], the sample deviation (n - 1) over √n; NaN where n is 1.
    """
    stacked = np.asarray(values, np.float64)
    count = len(stacked)
    if count == 1:
        return stacked[0], np.full_like(stacked[0], np.nan)
    return stacked.mean(axis=0), stacked.std(axis=0, ddof=1) / np.sqrt(count)
