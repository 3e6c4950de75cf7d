"""Made-up data sets, for trying out and timing what learns from images."""

from collections.abc import Mapping

import numpy as np


def images(
    *, count: int, size: int, channels: int = 3, num_classes: int = 10, seed: int = 0
) -> Mapping[str, np.ndarray]:
    """`count` uint8 images [size, size, channels] of independent uniform pixels; labels mean nothing."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8),
        "label": rng.integers(0, num_classes, count, dtype=np.int32),
    }
