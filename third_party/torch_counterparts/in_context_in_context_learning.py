"""Counterpart of `in_context.in_context_learning`: squared error on prompts of the curriculum's length."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from third_party.torch_counterparts.optimizers import make_minimize


def make_update(
    config: Mapping[str, Any], network: torch.nn.Module, batch: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], torch.Tensor]:
    del batch
    minimize = make_minimize(config, network)

    def update(batch: Mapping[str, Any]) -> torch.Tensor:
        return minimize((network(batch["xs"], batch["ys"]) - batch["ys"]).square().mean())

    return update
