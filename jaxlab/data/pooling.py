"""Data sets with smaller images."""

from collections.abc import Mapping

import numpy as np

from jaxlab.core import UserError


def mean_pool(dataset: Mapping[str, np.ndarray], *, pool: int) -> Mapping[str, np.ndarray]:
    """Images averaged over squares of `pool` × `pool` pixels, float32; the other columns as they are.

    Raises:
      UserError: the squares do not fill the images.
    """
    image = dataset["image"]
    count, height, width, channels = image.shape
    if pool < 1 or height % pool or width % pool:
        raise UserError(f"pooling.mean_pool: pool is {pool}; it must divide {height} × {width}.")
    squares = image.reshape(count, height // pool, pool, width // pool, pool, channels)
    return {**dataset, "image": squares.mean((2, 4), dtype=np.float32)}
