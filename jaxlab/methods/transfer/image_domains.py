"""Data sets for transfer: one in four domains, and labels of one as those of another."""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from jaxlab.core import UserError

Dataset = Mapping[str, np.ndarray]
Domain = Literal["identity", "inverted", "transposed", "inverted_transposed"]
DOMAINS = ("identity", "inverted", "transposed", "inverted_transposed")


def in_domain(dataset: Dataset, *, domain: Domain, maximum: float = 255.0) -> Dataset:
    """The images of a data set as one domain shows them; the other columns as they are.

    Args:
      dataset: `image` [N, H, W, C] in 0..maximum and other columns.
      domain: "inverted" is maximum - image, "transposed" swaps rows and columns, or both.
      maximum: of a pixel.

    Raises:
      UserError: unknown domain, pixels out of range, or images to transpose that are not square.
    """
    if domain not in DOMAINS:
        raise UserError(f"in_domain: no domain '{domain}'; it may be {', '.join(DOMAINS)}.")
    image = np.asarray(dataset["image"])
    if image.size and not 0 <= image.min() <= image.max() <= maximum:
        raise UserError(f"in_domain: pixels are in {image.min()}..{image.max()}, not 0..{maximum:g}.")
    if "inverted" in domain:
        image = image.dtype.type(maximum) - image
    if "transposed" in domain:
        if image.shape[1] != image.shape[2]:
            raise UserError(f"in_domain: images of {image.shape[1]} × {image.shape[2]} are not square.")
        image = np.ascontiguousarray(image.swapaxes(1, 2))
    return {**dataset, "image": image}


def in_all_domains(dataset: Dataset, *, maximum: float = 255.0) -> Dataset:
    """Every image in each of the four domains: 4N rows, `domain` int32 [4N] with the position of each."""
    parts = [in_domain(dataset, domain=domain, maximum=maximum) for domain in DOMAINS]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in dataset}
    size = len(parts[0]["image"])
    return {**columns, "domain": np.repeat(np.arange(len(DOMAINS), dtype=np.int32), size)}


def relabelled(dataset: Dataset, *, labels: tuple[int, ...]) -> Dataset:
    """A data set whose class i is `labels[i]`, without the examples of the classes that are -1 there.

    Args:
      dataset: `label` and other columns.
      labels: one for each class; of STL-10 as CIFAR-10: 0, 2, 1, 3, 4, 5, 7, -1, 8, 9.

    Raises:
      UserError: there are more classes than labels.
    """
    old = np.asarray(dataset["label"])
    if old.size and old.max() >= len(labels):
        raise UserError(f"relabelled: {len(labels)} labels, but the data set has class {old.max()}.")
    new = np.asarray(labels, np.int32)[old]
    kept = new >= 0
    return {name: column[kept] for name, column in {**dataset, "label": new}.items()}
