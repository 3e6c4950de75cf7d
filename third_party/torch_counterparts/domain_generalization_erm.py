"""Counterpart of `domain_generalization.erm`."""

from collections.abc import Mapping
from typing import Any

import torch

from third_party.torch_counterparts.environments import Update, penalized_update


def make_update(
    config: Mapping[str, Any],
    network: torch.nn.Module,
    batch: Mapping[str, Any],
    *,
    l2: float = 0.0,
    loss: str = "softmax",
) -> Update:
    del batch
    return penalized_update(config, network, None, l2=l2, loss=loss)
