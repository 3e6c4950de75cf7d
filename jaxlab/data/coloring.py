"""Coloured digits: grey images whose colour is a spurious attribute, almost a function of the label.

Colored MNIST of Nam et al., "Learning from Failure: Training Debiased Classifier from Biased Classifier"
(NeurIPS 2020), as the official code (alinlab/LfF) makes it: which image has which colour is deterministic,
the noise on a colour is drawn once for each image, arithmetic is float32, pixels are truncated to uint8.
The official code fixes no seed; the draws here are NumPy's.
"""

from collections.abc import Mapping

import jax
import numpy as np

from jaxlab.core import UserError
from jaxlab.data.pooling import mean_pool

Dataset = Mapping[str, np.ndarray]
Array = np.ndarray | jax.Array

# RGB of the attributes 0 to 9, [10, 3]: `colors.th` of the official code, to eight decimals.
MEAN_COLOR = np.float32(
    [
        [0.98368233, 0.31251901, 0.16857535],
        [0.99052966, 0.91560525, 0.35151219],
        [0.67296398, 0.46107048, 0.57980818],
        [0.78325194, 0.83155590, 0.60132939],
        [0.08801579, 0.77796334, 0.98180777],
        [0.32139337, 0.96105456, 0.44644988],
        [0.02461588, 0.23565048, 0.75866628],
        [0.55524695, 0.10158014, 0.76176316],
        [0.20772320, 0.39294851, 0.01870239],
        [0.83365762, 0.20240927, 0.26694310],
    ]
)


def make_bias_attributes(labels: np.ndarray, aligned_ratio: float, num_attrs: int) -> np.ndarray:
    """Gives a share `aligned_ratio` of each class c the attribute c, and all others equal shares of the rest.

    Nothing is random: along the examples of a class, in their order, the attribute ascends from 0 to
    `num_attrs` - 1. It passes from a to a + 1 where the cumulative share times the class size, rounded half
    to even, is reached, so each count is within one of its share.

    Args:
      labels: integers [N] in [0, `num_attrs`).
      aligned_ratio: in [0, 1]; `1 / num_attrs` makes the attribute independent of the label.
      num_attrs: the number of attributes, at least 2.

    Returns:
      Attributes, int32 [N].

    Raises:
      UserError: an argument is out of its range.
    """
    if not 0 <= aligned_ratio <= 1:
        raise UserError(f"coloring: aligned_ratio is {aligned_ratio}; it must be in 0..1.")
    if num_attrs < 2 or not np.isin(labels, np.arange(num_attrs)).all():
        raise UserError(f"coloring: num_attrs is {num_attrs}; it must be at least 2 and above every label.")
    attributes = np.empty(len(labels), np.int32)
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        shares = np.full(num_attrs, (1 - aligned_ratio) / (num_attrs - 1))
        shares[label] = aligned_ratio
        milestones = np.round(len(members) * np.cumsum(shares))
        attributes[members] = np.searchsorted(milestones, np.arange(len(members)), side="right")
    return attributes


def colorize(gray: Array, attr: Array, noise: Array, std: float, mean_color: Array) -> Array:
    """Paints each image in the colour of its attribute, with noise: `clip(mean_color + std * noise) * gray`.

    Arrays are all NumPy's, or all JAX's; with the latter it can be traced, but a compiler that fuses
    multiplication and addition may move a pixel by one.

    Args:
      gray: uint8 [N, H, W]; 0 stays black.
      attr: integers [N] in [0, A).
      noise: standard normal draws, float32 [N, 3].
      std: standard deviation of the noise on a colour; a colour is clipped to [0, 1].
      mean_color: RGB in [0, 1], float32 [A, 3].

    Returns:
      uint8 [N, H, W, 3], truncated and not rounded.
    """
    rgb = (mean_color[attr] + std * noise).clip(0, 1)
    return (rgb[:, None, None, :] * gray[..., None]).astype(np.uint8)


def colored_digits(
    dataset: Dataset,
    *,
    aligned_ratio: float,
    std: float,
    balanced: bool = False,
    pool: int = 1,
    seed: int = 0,
    maximum: float = 255.0,
    keep_gray: bool = False,
) -> Dataset:
    """Colours a data set of grey images and at most ten classes; class k is aligned with colour k.

    Args:
      dataset: `image` [N, H, W, 1] in [0, `maximum`] and `label` [N].
      aligned_ratio: the share of each class in its own colour: 0.95, 0.98, 0.99, 0.995 in the paper.
      std: of the colours, see `colorize`. The official severities 1 to 5, from the hardest colour to tell
        to the easiest, are 0.05, 0.02, 0.01, 0.005, 0.002.
      balanced: for evaluation: whatever `aligned_ratio` is, every colour is equally frequent in each class.
      pool: images are first averaged over squares of this side; the paper's are not.
      seed: of the noise on the colours; take another for the evaluation set.
      maximum: the grey value of white. Grey values are scaled from it to 255 and rounded before colouring,
        which leaves unpooled images of 0..255 as they are.
      keep_gray: whether to keep the images as they were before colouring.

    Returns:
      `image` uint8 [N, H / pool, W / pool, 3], `label` int32 [N], `attribute` int32 [N] and, where they are
      kept, `gray` uint8 [N, H / pool, W / pool].

    Raises:
      UserError: images are not grey, not in 0..`maximum` or not divisible by `pool`; see also
        `make_bias_attributes`.
    """
    image, label = dataset["image"], dataset["label"]
    count, channels = len(image), image.shape[-1]
    if channels != 1:
        raise UserError(f"coloring.colored_digits: images have {channels} channels; give grey ones.")
    if image.min() < 0 or image.max() > maximum:
        raise UserError(
            f"coloring.colored_digits: maximum is {maximum}, but pixels are in {image.min()}..{image.max()}."
        )
    pooled = mean_pool(dataset, pool=pool)["image"][..., 0]
    gray = np.rint(pooled * (255 / maximum)).astype(np.uint8)
    num_attrs = len(MEAN_COLOR)
    attribute = make_bias_attributes(label, 1 / num_attrs if balanced else aligned_ratio, num_attrs)
    noise = np.random.default_rng(seed).standard_normal((count, 3), dtype=np.float32)
    return {
        "image": colorize(gray, attribute, noise, std, MEAN_COLOR),
        "label": label.astype(np.int32),
        "attribute": attribute,
        **({"gray": gray} if keep_gray else {}),
    }
