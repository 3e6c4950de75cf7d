"""Synthetic outliers, made of a data set's own images.

Each builder returns a data set with the one column `image`, of the source's dtype and value range: an
outlier has no class. They are those with which Liu et al., "Energy-based Out-of-distribution Detection"
(NeurIPS 2020), and Hendrycks et al., "Deep Anomaly Detection with Outlier Exposure" (ICLR 2019), choose
hyper-parameters, and simple ones of ours. All are deterministic in their seed.
"""

import itertools
from collections.abc import Mapping

import numpy as np

from jaxlab.core import UserError

Dataset = Mapping[str, np.ndarray]


def uniform_noise(dataset: Dataset, *, count: int, maximum: float, seed: int = 0) -> Dataset:
    """`count` images of independent uniform pixels: integers 0 to `maximum`, or floats in [0, `maximum`)."""
    image = dataset["image"]
    rng, shape = np.random.default_rng(seed), (count, *image.shape[1:])
    if np.issubdtype(image.dtype, np.integer):
        return {"image": rng.integers(0, int(maximum), shape, dtype=image.dtype, endpoint=True)}
    return {"image": (maximum * rng.random(shape)).astype(image.dtype)}


def jigsaw(dataset: Dataset, *, seed: int = 0) -> Dataset:
    """Each image with its four quadrants in a random order, uniform over the 23 that change it.

    Raises:
      UserError: height or width are odd.
    """
    image = dataset["image"]
    count, height, width, channels = image.shape
    if height % 2 or width % 2:
        raise UserError(f"outliers.jigsaw: images of {height} × {width} have no equal quadrants.")
    quadrants = image.reshape(count, 2, height // 2, 2, width // 2, channels).swapaxes(2, 3)
    quadrants = quadrants.reshape(count, 4, height // 2, width // 2, channels)
    orders = np.array(list(itertools.permutations(range(4)))[1:])  # the first is the identity
    order = orders[np.random.default_rng(seed).integers(len(orders), size=count)]
    shuffled = quadrants[np.arange(count)[:, None], order]
    shuffled = shuffled.reshape(count, 2, 2, height // 2, width // 2, channels).swapaxes(2, 3)
    return {"image": shuffled.reshape(image.shape)}


def inverted(dataset: Dataset, *, maximum: float) -> Dataset:
    """Each image as its negative, `maximum - image`.

    Raises:
      UserError: a pixel is not in [0, `maximum`].
    """
    image = dataset["image"]
    if image.min() < 0 or image.max() > maximum:
        raise UserError(
            f"outliers.inverted: maximum {maximum}, but pixels are in {image.min()}..{image.max()}."
        )
    return {"image": image.dtype.type(maximum) - image}


def transposed_flipped(dataset: Dataset) -> Dataset:
    """Each image transposed, then mirrored left to right: turned by 90 degrees clockwise, [N, W, H, C]."""
    return {"image": np.ascontiguousarray(dataset["image"].swapaxes(1, 2)[:, :, ::-1])}


def pixel_permutation(dataset: Dataset, *, count: int, seed: int = 0) -> Dataset:
    """`count` images with their pixels in random order, fresh for each; the source's are used in turn.

    A pixel keeps its channels together.
    """
    image = dataset["image"][np.arange(count) % len(dataset["image"])]
    pixels = image.reshape(count, -1, image.shape[-1])
    order = np.random.default_rng(seed).random(pixels.shape[:2]).argsort(axis=1)
    return {"image": np.take_along_axis(pixels, order[..., None], axis=1).reshape(image.shape)}
