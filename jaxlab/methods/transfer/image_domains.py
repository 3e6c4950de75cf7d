"""One data set in four domains: as it is, inverted, transposed, and both."""

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
