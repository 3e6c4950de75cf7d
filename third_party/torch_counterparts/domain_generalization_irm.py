"""Counterpart of `domain_generalization.irm`: the penalty by automatic differentiation, as in both codes."""

from collections.abc import Mapping
from typing import Any

import torch

from third_party.torch_counterparts.environments import Update, environment_risks, penalized_update


def make_update(
    config: Mapping[str, Any],
    network: torch.nn.Module,
    batch: Mapping[str, Any],
    *,
    weight: float = 100.0,
    anneal_steps: int = 500,
    estimator: str = "split_half",
    loss: str = "softmax",
    l2: float = 0.0,
    rescale: bool = False,
    reset_optimizer: bool = True,
) -> Update:
    del batch

    def gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scale = torch.ones((), device=logits.device, requires_grad=True)
        risk = environment_risks((logits * scale)[None], labels[None], loss)[0]
        return torch.autograd.grad(risk, [scale], create_graph=True)[0]

    def penalty(logits: torch.Tensor, labels: torch.Tensor, risks: torch.Tensor) -> torch.Tensor:
        of_environments = []
        for own_logits, own_labels in zip(logits, labels):
            if estimator == "square":
                of_environments.append(gradient(own_logits, own_labels) ** 2)
            else:
                even = gradient(own_logits[::2], own_labels[::2])
                of_environments.append(even * gradient(own_logits[1::2], own_labels[1::2]))
        return torch.stack(of_environments).mean()

    return penalized_update(
        config,
        network,
        penalty,
        weight=weight,
        anneal_steps=anneal_steps,
        reset_optimizer=reset_optimizer,
        rescale=rescale,
        l2=l2,
        loss=loss,
    )
