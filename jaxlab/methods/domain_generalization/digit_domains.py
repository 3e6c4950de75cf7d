"""Digits in several domains: rotated, as RotatedMNIST of DomainBed, and in four visual contexts of ours.

Rotated MNIST: Ghifary et al., ICCV 2015, as made in Gulrajani & Lopez-Paz, ICLR 2021.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from PIL import Image

from jaxlab.core import UserError

Dataset = Mapping[str, np.ndarray]
Context = Literal["plain", "inverted", "noisy", "low_contrast"]

_NOISE_STD, _SHIFT = 0.35, 2


def rotated(dataset: Dataset, *, degrees: float) -> Dataset:
    """Digits turned counter-clockwise about their centre (bilinear), the corners black.

    Args:
      dataset: `image` uint8 [N, H, W, 1] and other columns.
      degrees: 0, 15, 30, 45, 60 and 75 in DomainBed.
    """

    def turn(image: np.ndarray) -> np.ndarray:
        turned = Image.fromarray(image[..., 0]).rotate(degrees, Image.Resampling.BILINEAR, fillcolor=0)
        return np.asarray(turned)[..., None]

    return {**dataset, "image": np.stack([turn(image) for image in dataset["image"]])}


def in_context(dataset: Dataset, *, context: Context, stride: int = 2, seed: int = 0) -> Dataset:
    """Digits as one context shows them.

    "plain"; "inverted", 1 - x; "noisy", x + N(0, 0.35²) clipped to [0, 1]; "low_contrast", 0.35 + 0.3 x moved
    by two pixels down and to the right.

    Args:
      dataset: `image` [N, H, W, 1] in 0..255 and other columns.
      context: which.
      stride: every which row and column is kept, first.
      seed: of the noise.

    Returns:
      `image` float32 [N, H / stride, W / stride, 1] in [0, 1] and the other columns.
    """
    image = dataset["image"][:, ::stride, ::stride].astype(np.float32) / np.float32(255)
    if context == "inverted":
        image = 1 - image
    elif context == "noisy":
        noise = np.random.default_rng(seed).standard_normal(image.shape, np.float32)
        image = np.clip(image + np.float32(_NOISE_STD) * noise, 0, 1)
    elif context == "low_contrast":
        moved = np.pad(image, ((0, 0), (_SHIFT, 0), (_SHIFT, 0), (0, 0)))[:, :-_SHIFT, :-_SHIFT]
        image = np.float32(0.35) + np.float32(0.3) * moved
    elif context != "plain":
        raise UserError(f"context: no '{context}'; it may be plain, inverted, noisy, low_contrast.")
    return {**dataset, "image": image}
