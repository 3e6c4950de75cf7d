"""Counterpart of `ood_detection.energy.fine_tune`, after the official code, wetliu/energy_ood."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from third_party.torch_counterparts.optimizers import make_minimize


def make_update(
    config: Mapping[str, Any],
    network: torch.nn.Module,
    batch: Mapping[str, Any],
    *,
    auxiliary_loss: str = "energy",
    weight: float | None = None,
    margin_in: float | None = None,
    margin_out: float | None = None,
    margin_slack: float = 2.0,
) -> Callable[[Mapping[str, Any]], torch.Tensor]:
    if weight is None:
        weight = {"energy": 0.1, "outlier_exposure": 0.5}[auxiliary_loss]
    network.eval()
    with torch.no_grad():
        if margin_in is None:
            margin_in = energy(network(batch["image"])).mean() - margin_slack
        if margin_out is None:
            margin_out = energy(network(batch["auxiliary"]["image"])).mean() + margin_slack
    network.train()
    minimize = make_minimize(config, network)

    def update(batch: Mapping[str, Any]) -> torch.Tensor:
        count_in = len(batch["image"])
        logits = network(torch.cat([batch["image"], batch["auxiliary"]["image"]]))
        logits_in, logits_out = logits[:count_in], logits[count_in:]
        if auxiliary_loss == "energy":
            auxiliary = F.relu(energy(logits_in) - margin_in).square().mean()
            auxiliary = auxiliary + F.relu(margin_out - energy(logits_out)).square().mean()
        else:
            auxiliary = -F.log_softmax(logits_out, dim=1).mean()
        return minimize(F.cross_entropy(logits_in, batch["label"]) + weight * auxiliary)

    return update


def energy(logits: torch.Tensor) -> torch.Tensor:
    return -torch.logsumexp(logits, dim=1)
