"""From a data section to batches: a data set in memory, drawn from at random, as an ordinary script does.

Prompts of in-context learning are sampled on the host at every step, as in dtsip/in-context-learning.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from third_party.torch_counterparts import NoCounterpart, call

Transform = Callable[[torch.Tensor], torch.Tensor]


def make_sample(section: Mapping[str, Any], *, batch_size: int, device: str) -> Callable[[], dict[str, Any]]:
    """Returns `sample() -> batch`.

    Args:
      section: a config's data section, in which each `dataset` is the path of an .npz file with the columns.
      batch_size: where the section gives none.
      device: where the data lie.
    """
    if section["name"] == "streams.with_auxiliary":
        main = make_sample(section["stream"], batch_size=batch_size, device=device)
        auxiliary = make_sample(section["auxiliary"], batch_size=batch_size, device=device)
        return lambda: {**main(), "auxiliary": auxiliary()}
    if section["name"] == "in_context.prompts.in_context_prompts":
        return call({section["name"]: _prompts}, section, device, batch_size)
    if section["name"] == "streams.environments":
        samples = [make_sample(s, batch_size=batch_size, device=device) for s in section["streams"]]
        return lambda: _stack([sample() for sample in samples])
    if section["name"] == "domain_generalization.colored_mnist.full_batch":
        return call({section["name"]: _colored_mnist}, section, device)
    if section["name"] not in ("streams.resident", "streams.sampled"):
        raise NoCounterpart(f"no counterpart of {section['name']}")
    with np.load(section["dataset"]) as columns:
        tensors = {name: torch.from_numpy(columns[name]).to(device) for name in columns}
    if "label" in tensors:
        tensors["label"] = tensors["label"].long()
    tensors["image"] = tensors["image"].movedim(-1, 1).contiguous()
    transforms = [call(_TRANSFORMS, transform, device) for transform in section.get("transforms", ())]
    batch_size = section.get("batch_size", batch_size)

    def sample() -> dict[str, Any]:
        index = torch.randint(len(tensors["image"]), (batch_size,), device=device)
        batch = {"index": index, **{name: tensor[index] for name, tensor in tensors.items()}}
        for transform in transforms:
            batch["image"] = transform(batch["image"])
        return batch

    return sample


def _stack(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}


def _colored_mnist(
    device: str,
    *,
    dataset: str,
    flips: Sequence[float] = (0.2, 0.1),
    stride: int = 2,
    context: str = "environment",
    transforms: Sequence[Mapping[str, Any]] = (),
) -> Callable[[], dict[str, torch.Tensor]]:
    """One batch, made once, as in the official code."""
    with np.load(dataset) as columns:
        order = torch.randperm(len(columns["label"]))
        images, digits = (torch.from_numpy(columns[name])[order] for name in ("image", "label"))
    environments = []
    for index, flip in enumerate(flips):
        gray = images[index :: len(flips), ::stride, ::stride, 0].float() / 255
        label = (digits[index :: len(flips)] < 5) ^ (torch.rand(len(gray)) < 0.25)
        color = label ^ (torch.rand(len(gray)) < flip)
        image = gray[:, None] * torch.stack([~color, color], dim=1)[:, :, None, None]
        environments.append({"image": image.to(device), "label": label.long().to(device)})
    batch = _stack(environments)
    for transform in transforms:
        batch["image"] = call(_TRANSFORMS, transform, device)(batch["image"])
    return lambda: batch


def _prompts(
    device: str,
    default_batch_size: int,
    *,
    function: Mapping[str, Any],
    dimension: int,
    num_points: int,
    batch_size: int | None = None,
    dims_curriculum: Mapping[str, int] | None = None,
    points_curriculum: Mapping[str, int] | None = None,
) -> Callable[[], dict[str, torch.Tensor]]:
    if dict(function) != {"name": "linear"}:
        raise NoCounterpart(f"no counterpart of {function['name']} and its keys")
    batch_size, steps = batch_size or default_batch_size, itertools.count()

    def value(curriculum: Mapping[str, int] | None, step: int, whole: int) -> int:
        if curriculum is None:
            return whole
        grown = curriculum["start"] + curriculum["inc"] * (step // curriculum["interval"])
        return min(grown, curriculum["end"])

    def sample() -> dict[str, torch.Tensor]:
        step = next(steps)
        xs = torch.randn(batch_size, value(points_curriculum, step, num_points), dimension)
        xs[:, :, value(dims_curriculum, step, dimension) :] = 0
        w = torch.randn(batch_size, dimension, 1)
        return {"xs": xs.to(device), "ys": (xs @ w)[:, :, 0].to(device)}

    return sample


def _standardize(device: str, *, scale=255.0, mean=(0.0,), std=(1.0,)) -> Transform:
    mean, std = (torch.tensor(values, device=device).reshape(-1, 1, 1) for values in (mean, std))
    return lambda image: (image.float() / scale - mean) / std


def _random_crop(device: str, *, padding: int) -> Transform:
    def crop(image: torch.Tensor) -> torch.Tensor:
        count, _, height, width = image.shape
        padded = F.pad(image, (padding,) * 4)
        top, left = torch.randint(2 * padding + 1, (2, count, 1), device=device)
        rows = (top + torch.arange(height, device=device))[:, :, None]
        columns = (left + torch.arange(width, device=device))[:, None, :]
        example = torch.arange(count, device=device)[:, None, None]
        return padded[example, :, rows, columns].movedim(-1, 1)

    return crop


def _random_flip(device: str) -> Transform:
    def flip(image: torch.Tensor) -> torch.Tensor:
        flipped = torch.rand(len(image), 1, 1, 1, device=device) < 0.5
        return torch.where(flipped, image.flip(-1), image)

    return flip


def _without_color(device: str) -> Transform:
    return lambda image: image.sum(-3, keepdim=True)


_TRANSFORMS = {
    "domain_generalization.colored_mnist.without_color": _without_color,
    "transforms.standardize": _standardize,
    "transforms.random_crop": _random_crop,
    "transforms.random_flip": _random_flip,
}
