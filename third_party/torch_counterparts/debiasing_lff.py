"""Counterpart of `debiasing.lff`, after the official code, alinlab/LfF."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from third_party.torch_counterparts import NoCounterpart
from third_party.torch_counterparts.networks import make_network
from third_party.torch_counterparts.optimizers import make_minimize


class LossMemory:
    """The official code's `EMA`."""

    def __init__(self, labels: torch.Tensor, decay: float):
        self.labels, self.decay = labels, decay
        self.value = torch.zeros(len(labels), device=labels.device)
        self.seen = torch.zeros(len(labels), device=labels.device)

    def update(self, index: torch.Tensor, loss: torch.Tensor) -> None:
        old, kept = self.value[index], self.decay * self.seen[index]
        self.value[index] = self.decay * old + (1 - kept) * loss
        self.seen[index] = 1

    def class_max(self, label: torch.Tensor) -> torch.Tensor:
        return self.value[self.labels == label].max()


def make_update(
    config: Mapping[str, Any],
    network: torch.nn.Module,
    batch: Mapping[str, Any],
    *,
    dataset: Any,
    q: float = 0.7,
    decay: float = 0.7,
    biased_loss: str = "generalized_cross_entropy",
) -> Callable[[Mapping[str, Any]], torch.Tensor]:
    del dataset  # described, not built; the stream's own lies in a file
    device = batch["label"].device
    with np.load(config["data"]["dataset"]) as columns:
        labels = torch.from_numpy(columns["label"]).to(device)
    biased_network = make_network(config["network"], batch["image"].shape[1:]).to(device)
    if config["clip_norm"]:
        raise NoCounterpart("no counterpart of config.clip_norm for each of two networks")
    # One optimizer of both takes each parameter's step for itself, as the official code's two do.
    minimize = make_minimize(config, torch.nn.ModuleList([network, biased_network]))
    memory, biased_memory = LossMemory(labels, decay), LossMemory(labels, decay)

    def update(batch: Mapping[str, Any]) -> torch.Tensor:
        image, label, index = batch["image"], batch["label"], batch["index"]
        logits, biased_logits = network(image), biased_network(image)
        losses = F.cross_entropy(logits, label, reduction="none")
        biased_losses = F.cross_entropy(biased_logits, label, reduction="none")
        memory.update(index, losses.detach())
        biased_memory.update(index, biased_losses.detach())

        debiased_share, biased_share = memory.value[index], biased_memory.value[index]
        for c in label.unique():
            of_class = label == c
            debiased_share[of_class] /= memory.class_max(c)
            biased_share[of_class] /= biased_memory.class_max(c)
        weight = biased_share / (biased_share + debiased_share + 1e-8)

        if biased_loss == "generalized_cross_entropy":
            p_y = F.softmax(biased_logits, dim=1).gather(1, label[:, None])[:, 0].detach()
            biased_losses = q * p_y**q * biased_losses
        return minimize(torch.mean(biased_losses) + torch.mean(weight * losses))

    return update
