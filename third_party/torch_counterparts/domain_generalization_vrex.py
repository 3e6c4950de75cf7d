"""Counterpart of `domain_generalization.vrex`."""

from collections.abc import Mapping
from typing import Any

import torch

from third_party.torch_counterparts.environments import Update, penalized_update


def make_update(
    config: Mapping[str, Any],
    network: torch.nn.Module,
    batch: Mapping[str, Any],
    *,
    weight: float = 10.0,
    anneal_steps: int = 500,
    kind: str = "variance",
    **keys: Any,
) -> Update:
    del batch

    def penalty(logits: torch.Tensor, labels: torch.Tensor, risks: torch.Tensor) -> torch.Tensor:
        if kind == "variance":
            return ((risks - risks.mean()) ** 2).mean()
        differences = torch.pdist(risks[:, None], p=1)
        return (differences**2 if kind == "pair_square" else differences).sum()

    keys = {"reset_optimizer": True, **keys}
    return penalized_update(config, network, penalty, weight=weight, anneal_steps=anneal_steps, **keys)
