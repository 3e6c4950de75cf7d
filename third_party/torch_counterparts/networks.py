"""The networks of `jaxlab.nn` as PyTorch modules, whose submodules have the names of our parameters.

They take images [B, C, H, W] and return logits [B, K]. PyTorch's default initialisation stands in for
`kernel_init` and `bias_init`: it has no part in the speed of a step.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from third_party.torch_counterparts import NoCounterpart, call
from third_party.torch_counterparts.gpt import in_context_model

Activation = Callable[[torch.Tensor], torch.Tensor]

_ACTIVATIONS: dict[str, Activation] = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def make_network(section: Mapping[str, Any], image_shape: Sequence[int]) -> nn.Module:
    """The module that a network section names, in training mode.

    For images of shape [C, H, W], or prompts of shape [K, d]. With a key `compile` that is true
    `torch.compile` compiles it, when it is first called.
    """
    section = dict(section)
    if section.pop("compile", False):
        network = make_network(section, image_shape)
        network.compile()
        return network
    if section["name"] in _PROMPT_NETWORKS:
        return call(_PROMPT_NETWORKS, section, image_shape)
    keys = {key: value for key, value in section.items() if key not in ("kernel_init", "bias_init")}
    activation, dtype = keys.pop("activation", "relu"), keys.pop("dtype", "float32")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS or dtype != "float32":
        raise NoCounterpart(f"no counterpart of {activation} in {dtype}")
    return call(_NETWORKS, keys, image_shape, activation=_ACTIVATIONS[activation])


class MLP(nn.Module):
    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        activation: Activation,
        order: str = "convention",
        hidden: Sequence[int] = (128,),
        norm: str | None = None,
        use_bias: bool | None = None,
        dropout_rate: float = 0.0,
    ):
        super().__init__()
        use_bias = _needs_bias(use_bias, order if norm else "swap")
        self.activation, self.normalized, self.dropout_rate = activation, norm is not None, dropout_rate
        sizes = [torch.Size(image_shape).numel(), *hidden]
        self.depth = len(hidden)
        for i in range(1, len(sizes)):
            self.add_module(f"dense{i}", nn.Linear(sizes[i - 1], sizes[i], bias=use_bias))
            if self.normalized:
                norm_class = _norm_activation(nn.BatchNorm1d, activation, order)
                self.add_module(f"norm{i}", norm_class(sizes[i]))
        self.head = nn.Linear(sizes[-1], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.movedim(1, -1).flatten(1)  # in the order of [H, W, C], as ours is
        for i in range(1, self.depth + 1):
            x = getattr(self, f"dense{i}")(x)
            x = getattr(self, f"norm{i}")(x) if self.normalized else self.activation(x)
            if self.dropout_rate:
                x = F.dropout(x, self.dropout_rate, self.training)
        return self.head(x)


class ConvNet(nn.Module):
    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        activation: Activation,
        order: str = "convention",
        use_bias: bool | None = None,
        channels: Sequence[int] = (16, 32, 64),
        strides: Sequence[int] = (1, 2, 2),
    ):
        super().__init__()
        use_bias = _needs_bias(use_bias, order)
        norm = _norm_activation(nn.BatchNorm2d, activation, order)
        self.depth, inputs = len(channels), image_shape[0]
        for i, (outputs, stride) in enumerate(zip(channels, strides), start=1):
            self.add_module(f"conv{i}", _conv3(inputs, outputs, stride, use_bias))
            self.add_module(f"norm{i}", norm(outputs))
            inputs = outputs
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(1, self.depth + 1):
            x = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x))
        return self.head(x.mean((2, 3)))


class WideBlock(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        *,
        norm: type[nn.Module],
        use_bias: bool,
        dropout_rate: float,
    ):
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), _conv3(inputs, outputs, stride, use_bias)
        self.norm2, self.conv2 = norm(outputs), _conv3(outputs, outputs, 1, use_bias)
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        self.dropout_rate = dropout_rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = self.norm1(x)
        h = self.norm2(self.conv1(activated))
        if self.dropout_rate:
            h = F.dropout(h, self.dropout_rate, self.training)
        return self.conv2(h) + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        activation: Activation,
        order: str = "convention",
        use_bias: bool | None = None,
        depth: int = 40,
        widen_factor: int = 2,
        dropout_rate: float = 0.3,
    ):
        super().__init__()
        norm = _norm_activation(nn.BatchNorm2d, activation, order)
        channels = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        use_bias = _needs_bias(use_bias, order)
        block = partial(WideBlock, norm=norm, use_bias=use_bias, dropout_rate=dropout_rate)
        self.stem = _conv3(image_shape[0], 16, 1, use_bias)
        self.blocks = _add_groups(self, block, 16, channels, [(depth - 4) // 6] * 3)
        self.norm = norm(channels[-1])
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for name in self.blocks:
            x = getattr(self, name)(x)
        return self.head(self.norm(x).mean((2, 3)))


class BasicBlock(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        *,
        activation: Activation,
        order: str,
        use_bias: bool,
        project: bool,
    ):
        super().__init__()
        norm = _norm_activation(nn.BatchNorm2d, activation, order)
        self.conv1, self.norm1 = _conv3(inputs, outputs, stride, use_bias), norm(outputs)
        self.conv2 = _conv3(outputs, outputs, 1, use_bias)
        # Where the normalisation comes first, the activation waits for the shortcut.
        self.norm2 = nn.BatchNorm2d(outputs) if order == "convention" else norm(outputs)
        self.activation = activation if order == "convention" else nn.Identity()
        self.stride, self.padding = stride, (outputs - inputs) // 2
        self.project = project and inputs != outputs
        if self.project:
            self.shortcut_conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        if self.project:
            x = self.shortcut_norm(self.shortcut_conv(x))
        elif self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return self.activation(h + x)


class ResNet(nn.Module):
    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        activation: Activation,
        order: str = "convention",
        use_bias: bool | None = None,
        depth: int,
    ):
        super().__init__()
        channels, counts = {
            18: ((64, 128, 256, 512), (2, 2, 2, 2)),
            20: ((16, 32, 64), (3, 3, 3)),
            34: ((64, 128, 256, 512), (3, 4, 6, 3)),
        }[depth]
        use_bias = _needs_bias(use_bias, order)
        pair = dict(activation=activation, order=order, use_bias=use_bias)
        block = partial(BasicBlock, **pair, project=depth != 20)
        self.stem = _conv3(image_shape[0], channels[0], 1, use_bias)
        self.stem_norm = _norm_activation(nn.BatchNorm2d, activation, order)(channels[0])
        self.blocks = _add_groups(self, block, channels[0], channels, counts)
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem_norm(self.stem(x))
        for name in self.blocks:
            x = getattr(self, name)(x)
        return self.head(x.mean((2, 3)))


def _norm_activation(norm: type[nn.Module], activation: Activation, order: str) -> type[nn.Module]:
    """A normalisation layer with the activation before or after it."""

    class NormActivation(norm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if order == "convention":
                return activation(super().forward(x))
            return super().forward(activation(x))

    return NormActivation


def _needs_bias(use_bias: bool | None, order: str) -> bool:
    return order == "swap" if use_bias is None else use_bias


def _conv3(inputs: int, outputs: int, stride: int, use_bias: bool) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=use_bias)


def _add_groups(
    module: nn.Module,
    block: Callable[[int, int, int], nn.Module],
    inputs: int,
    channels: Sequence[int],
    counts: Sequence[int],
) -> list[str]:
    """Adds groups of blocks, of which all but the first begin with stride 2; returns the blocks' names."""
    names = []
    for group, (outputs, count) in enumerate(zip(channels, counts), start=1):
        for i in range(1, count + 1):
            names.append(f"group{group}_block{i}")
            module.add_module(names[-1], block(inputs, outputs, 2 if group > 1 and i == 1 else 1))
            inputs = outputs
    return names


_NETWORKS = {"mlp": MLP, "conv_net": ConvNet, "wide_resnet": WideResNet, "resnet": ResNet}
_PROMPT_NETWORKS = {"in_context.model.in_context_model": in_context_model}
