"""Counterpart of `supervised.erm`: cross-entropy."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from third_party.torch_counterparts.optimizers import make_minimize


def make_update(
    config: Mapping[str, Any], network: torch.nn.Module, batch: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], torch.Tensor]:
    del batch
    minimize = make_minimize(config, network)

    def update(batch: Mapping[str, Any]) -> torch.Tensor:
        return minimize(F.cross_entropy(network(batch["image"]), batch["label"]))

    return update
