"""From an optimizer section, which names Optax's functions, to `torch.optim`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from third_party.torch_counterparts import NoCounterpart, call


def make_minimize(
    config: Mapping[str, Any], network: torch.nn.Module
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns `minimize(loss) -> loss`, which moves the network's parameters against the gradient."""
    if config["accumulate_steps"] > 1:
        raise NoCounterpart("no counterpart of config.accumulate_steps")
    optimizer, schedule = _make_optimizer(config["optimizer"], network.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    clip_norm = config["clip_norm"]

    def minimize(loss: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss.backward()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimizer.step()
        scheduler.step()
        return loss.detach()

    return minimize


def _make_optimizer(
    section: Mapping[str, Any], parameters: Any
) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """The optimizer at learning rate 1, and the rate of each update, counted from 0."""
    *before, last = section["args"] if section["name"] == "chain" else [section]
    keys = dict(last)
    rate = keys.pop("learning_rate", None)
    for extra in before:
        if extra["name"] != "add_decayed_weights" or last["name"] == "adamw":
            raise NoCounterpart(f"no counterpart of {extra['name']} before {last['name']}")
        keys |= {key: value for key, value in extra.items() if key != "name"}
    optimizer = call({"sgd": _sgd, "adam": _adam, "adamw": _adamw}, keys, parameters)
    if isinstance(rate, Mapping):
        return optimizer, call(_SCHEDULES, rate)
    return optimizer, lambda count: rate


def _sgd(parameters, *, momentum=None, nesterov=False, weight_decay=0.0):
    return torch.optim.SGD(
        parameters, lr=1.0, momentum=momentum or 0.0, nesterov=nesterov, weight_decay=weight_decay
    )


def _adam(parameters, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    return torch.optim.Adam(parameters, lr=1.0, betas=(b1, b2), eps=eps, weight_decay=weight_decay)


def _adamw(parameters, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-4):
    return torch.optim.AdamW(parameters, lr=1.0, betas=(b1, b2), eps=eps, weight_decay=weight_decay)


def _cosine(init_value: float, decay_steps: int, alpha: float = 0.0) -> Callable[[int], float]:
    def rate(count: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(count, decay_steps) / decay_steps))
        return init_value * ((1 - alpha) * cosine + alpha)

    return rate


def _cosine_ahead(init_value: float, decay_steps: int, final_value: float = 1e-6) -> Callable[[int], float]:
    cosine = _cosine(init_value, decay_steps, final_value / init_value)
    return lambda count: cosine(count + 1)


_SCHEDULES = {
    "cosine_decay_schedule": _cosine,
    "jaxlab.methods.ood_detection.energy:cosine_schedule": _cosine_ahead,
}
