"""What the counterparts of domain generalisation share: batches [E, n, C, H, W], risks, penalties."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from third_party.torch_counterparts.optimizers import make_minimize

Update = Callable[[Mapping[str, Any]], torch.Tensor]


def environment_logits(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return network(images.flatten(0, 1)).unflatten(0, images.shape[:2])


def environment_risks(logits: torch.Tensor, labels: torch.Tensor, loss: str) -> torch.Tensor:
    if loss == "sigmoid":
        each = F.binary_cross_entropy_with_logits(logits[..., 0], labels.float(), reduction="none")
    else:
        each = F.cross_entropy(logits.movedim(2, 1), labels, reduction="none")
    return each.mean(1)


def penalized_update(
    config: Mapping[str, Any],
    network: torch.nn.Module,
    penalty: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None,
    *,
    weight: float = 0.0,
    anneal_steps: int = 0,
    reset_optimizer: bool = False,
    rescale: bool = False,
    l2: float = 0.0,
    reduction: str = "mean",
    loss: str = "softmax",
) -> Update:
    """`update` of `penalty(logits, labels, risks)`, as `minimize_penalized_risk` of ours."""
    state = {"step": 0, "minimize": make_minimize(config, network)}

    def update(batch: Mapping[str, Any]) -> torch.Tensor:
        if reset_optimizer and state["step"] == anneal_steps:
            state["minimize"] = make_minimize(config, network)
        p_t = 1.0 if state["step"] < anneal_steps else weight
        state["step"] += 1
        logits = environment_logits(network, batch["image"])
        risks = environment_risks(logits, batch["label"], loss)
        value = risks.sum() if reduction == "sum" else risks.mean()
        if l2:
            value = value + l2 * sum(w.norm().pow(2) for w in network.parameters())
        if penalty is not None:
            value = value + p_t * penalty(logits, batch["label"], risks)
        if rescale and p_t > 1:
            value = value / p_t
        return state["minimize"](value)

    return update
