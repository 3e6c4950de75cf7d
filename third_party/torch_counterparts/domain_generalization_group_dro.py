"""Counterpart of `domain_generalization.group_dro`, its groups being the environments."""

from collections.abc import Mapping
from typing import Any

import torch

from third_party.torch_counterparts.environments import Update, environment_logits, environment_risks
from third_party.torch_counterparts.optimizers import make_minimize


def make_update(
    config: Mapping[str, Any],
    network: torch.nn.Module,
    batch: Mapping[str, Any],
    *,
    step_size: float = 0.01,
    loss: str = "softmax",
    l2: float = 0.0,
) -> Update:
    minimize = make_minimize(config, network)
    q = torch.ones(len(batch["label"]), device=batch["label"].device) / len(batch["label"])

    def update(batch: Mapping[str, Any]) -> torch.Tensor:
        nonlocal q
        logits = torch.cat([environment_logits(network, image[None]) for image in batch["image"]])
        risks = environment_risks(logits, batch["label"], loss)
        q = q * (step_size * risks.detach()).exp()
        q = q / q.sum()
        value = (q * risks).sum()
        if l2:
            value = value + l2 * sum(w.norm().pow(2) for w in network.parameters())
        return minimize(value)

    return update
