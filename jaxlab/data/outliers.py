"""Synthetic outliers, made of a data set's own images.

Each builder returns a data set with the one column `image`, of the source's dtype and value range: an
outlier has no class. They are those with which Liu et al., "Energy-based Out-of-distribution Detection"
(NeurIPS 2020), and Hendrycks et al., "Deep Anomaly Detection with Outlier Exposure" (ICLR 2019), choose
hyper-parameters, and simple ones of ours. All are deterministic in their seed.
"""

import itertools
from collections.abc import Mapping

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from jaxlab.core import UserError

Dataset = Mapping[str, np.ndarray]


def uniform_noise(dataset: Dataset, *, count: int, maximum: float, seed: int = 0) -> Dataset:
    """`count` images of independent uniform pixels: integers 0 to `maximum`, or floats in [0, `maximum`)."""
    image = dataset["image"]
    rng, shape = np.random.default_rng(seed), (count, *image.shape[1:])
    if np.issubdtype(image.dtype, np.integer):
        return {"image": rng.integers(0, int(maximum), shape, dtype=image.dtype, endpoint=True)}
    return {"image": (maximum * rng.random(shape)).astype(image.dtype)}


def gaussian_noise(dataset: Dataset, *, count: int, maximum: float, seed: int = 0) -> Dataset:
    """`count` images of independent Gaussian pixels around the middle of [0, `maximum`], clipped; float32.

    Their deviation is a quarter of `maximum`.
    """
    noise = np.random.default_rng(seed).standard_normal((count, *dataset["image"].shape[1:]), np.float32)
    return {"image": np.clip(np.float32(maximum) * (0.5 + 0.25 * noise), 0, np.float32(maximum))}


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


def mirrored(dataset: Dataset) -> Dataset:
    """Each image mirrored left to right."""
    return {"image": np.ascontiguousarray(dataset["image"][:, :, ::-1])}


def pixel_permutation(dataset: Dataset, *, count: int, seed: int = 0) -> Dataset:
    """`count` images with their pixels in random order, fresh for each; the source's are used in turn.

    A pixel keeps its channels together.
    """
    image = dataset["image"][np.arange(count) % len(dataset["image"])]
    pixels = image.reshape(count, -1, image.shape[-1])
    order = np.random.default_rng(seed).random(pixels.shape[:2]).argsort(axis=1)
    return {"image": np.take_along_axis(pixels, order[..., None], axis=1).reshape(image.shape)}


# --- Auxiliary outliers of no data set ---


def smooth_noise(*, count: int, size: int, maximum: float, seed: int = 0) -> Dataset:
    """`count` grey images of Gaussian noise, blurred with σ of 0.7, 1.5 or 3 pixels; float32.

    Each is stretched to [0, `maximum`]; every other one is then black and white, white in its brightest 30 %.
    """
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((count, size, size), np.float32)
    sigmas = rng.choice([0.7, 1.5, 3.0], size=count)
    blurred = np.stack([gaussian_filter(image, sigma) for image, sigma in zip(noise, sigmas)])
    low, high = blurred.min((1, 2), keepdims=True), blurred.max((1, 2), keepdims=True)
    image = (blurred - low) / (high - low)
    image[::2] = image[::2] > np.quantile(image[::2], 0.7, axis=(1, 2), keepdims=True)
    return {"image": np.float32(maximum) * image[..., None]}


def soft_strokes(*, count: int, size: int, maximum: float, seed: int = 0) -> Dataset:
    """`count` grey images of one to four straight, soft strokes on black, in [0, `maximum`]; float32."""
    rng = np.random.default_rng(seed)
    most = 4
    ends = rng.uniform(0, size - 1, (count, most, 2, 2)).astype(np.float32)
    widths = rng.uniform(0.5, 1.5, (count, most)).astype(np.float32) * size / 14
    drawn = np.arange(most) < rng.integers(1, most + 1, count)[:, None]
    pixels = np.stack(np.meshgrid(*[np.arange(size, dtype=np.float32)] * 2, indexing="ij"), axis=-1)
    image = np.zeros((count, size, size), np.float32)
    for stroke in range(most):
        start, end = (ends[:, stroke, i, None, None] for i in (0, 1))  # [count, 1, 1, 2]
        along = end - start
        share = ((pixels - start) * along).sum(-1) / np.maximum((along**2).sum(-1), 1e-6)
        nearest = start + np.clip(share, 0, 1)[..., None] * along
        distance = np.linalg.norm(pixels - nearest, axis=-1)
        ink = np.exp(-((distance / widths[:, stroke, None, None]) ** 2)) * drawn[:, stroke, None, None]
        image = np.maximum(image, ink)
    return {"image": np.float32(maximum) * image[..., None]}


def concatenated(datasets: tuple[Dataset, ...]) -> Dataset:
    """The images of several sets of outliers, one after the other."""
    return {"image": np.concatenate([dataset["image"] for dataset in datasets])}


# --- The validation outliers of Hendrycks et al., of images in [0, `maximum`] ---


def _pairs(dataset: Dataset, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` pairs of images, each of two different ones."""
    image = dataset["image"]
    if len(image) < 2:
        raise UserError("outliers: a mean of two images needs a data set of two or more.")
    rng = np.random.default_rng(seed)
    first = rng.integers(len(image), size=count)
    second = (first + rng.integers(1, len(image), size=count)) % len(image)
    return image[first].astype(np.float32), image[second].astype(np.float32)


def arithmetic_mean(dataset: Dataset, *, count: int, seed: int = 0) -> Dataset:
    """`count` images, each the mean of two random ones; float32.

    Raises:
      UserError: there are not two.
    """
    first, second = _pairs(dataset, count, seed)
    return {"image": (first + second) / 2}


def geometric_mean(dataset: Dataset, *, count: int, seed: int = 0) -> Dataset:
    """`count` images, each √(x · x') of two random ones; float32.

    Raises:
      UserError: there are not two.
    """
    first, second = _pairs(dataset, count, seed)
    return {"image": np.sqrt(first * second)}


def quadrant_jigsaw(dataset: Dataset) -> Dataset:
    """Each image as the jigsaw of the official code, which is always the same.

    The upper half becomes the upper left quadrant, its own upper and lower half exchanged, beside the lower
    left one; the lower half the lower right quadrant beside the upper right one, its own left and right half
    exchanged.

    Raises:
      UserError: height or width is no multiple of 4.
    """
    image = dataset["image"]
    _, height, width, _ = image.shape
    if height % 4 or width % 4:
        raise UserError(f"outliers.quadrant_jigsaw: images of {height} × {width} are no multiples of 4.")
    upper, lower = np.split(image, 2, axis=1)
    (upper_left, upper_right), (lower_left, lower_right) = (np.split(x, 2, axis=2) for x in (upper, lower))
    upper_left, upper_right = np.roll(upper_left, height // 4, 1), np.roll(upper_right, width // 4, 2)
    rows = [np.concatenate(row, axis=2) for row in ((upper_left, lower_left), (lower_right, upper_right))]
    return {"image": np.concatenate(rows, axis=1)}


def speckle(dataset: Dataset, *, maximum: float, seed: int = 0) -> Dataset:
    """Each image times 1 + N(0, 1), pixel by pixel, clipped to [0, `maximum`]; float32."""
    image = dataset["image"].astype(np.float32)
    noise = np.random.default_rng(seed).standard_normal(image.shape, np.float32)
    return {"image": np.clip(image + image * noise, 0, np.float32(maximum))}


def pixelate(dataset: Dataset, *, size: int = 6) -> Dataset:
    """Each image reduced to `size` × `size` pixels and enlarged again, by means over boxes; uint8 images."""

    def reduce(image: np.ndarray) -> np.ndarray:
        pixels = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        small = pixels.resize((size, size), Image.Resampling.BOX)
        large = np.asarray(small.resize(pixels.size, Image.Resampling.BOX))
        return large.reshape(image.shape)

    return {"image": np.stack([reduce(image) for image in dataset["image"]])}


def rgb_ghost(dataset: Dataset) -> Dataset:
    """Each RGB image with the channels (mirrored green, blue, red).

    Raises:
      UserError: images are not RGB.
    """
    red, green, blue = _rgb(dataset)
    return {"image": np.stack([green[:, :, ::-1], blue, red], axis=-1)}


def partly_inverted(dataset: Dataset, *, maximum: float) -> Dataset:
    """Each RGB image with green and blue, not red, as their negatives.

    Raises:
      UserError: images are not RGB.
    """
    red, green, blue = _rgb(dataset)
    white = dataset["image"].dtype.type(maximum)
    return {"image": np.stack([red, white - green, white - blue], axis=-1)}


def _rgb(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if dataset["image"].shape[-1] != 3:
        raise UserError(f"outliers: images have {dataset['image'].shape[-1]} channels; give RGB ones.")
    red, green, blue = np.moveaxis(dataset["image"], -1, 0)
    return red, green, blue
