"""Residual networks for small images (He et al., "Deep Residual Learning", arXiv 1512.03385).

Depth 20 is the paper's own network for CIFAR (section 4.2): 16, 32, 64 channels, three blocks each, and
shortcuts without parameters (option A: subsample, pad the new channels with zeros). Depths 18 and 34 are
its ImageNet networks as they are commonly used on CIFAR: 64 to 512 channels, a 3×3 stem of stride 1
without max pooling, and projection shortcuts where the shape changes (option B).
"""

import functools
from typing import Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from jaxlab.core import Network, Outputs
from jaxlab.nn import activations
from jaxlab.nn.activations import Activation, submodule
from jaxlab.nn.layers import HE_NORMAL, classify
from jaxlab.nn.linen import from_linen
from jaxlab.nn.normalization import BatchNorm, NormActivation, Order, needs_bias, sow_activations


class Layout(NamedTuple):
    """Channels and number of blocks of each group, and whether shortcuts project (option B) or pad (A)."""

    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    project: bool


LAYOUTS = {
    18: Layout(channels=(64, 128, 256, 512), blocks=(2, 2, 2, 2), project=True),
    20: Layout(channels=(16, 32, 64), blocks=(3, 3, 3), project=False),
    34: Layout(channels=(64, 128, 256, 512), blocks=(3, 4, 6, 3), project=True),
}


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut; see `resnet`."""

    features: int
    stride: int
    project: bool
    order: Order
    activation: Activation
    use_bias: bool
    kernel_init: Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = functools.partial(
            nn.Conv, self.features, use_bias=self.use_bias, dtype=self.dtype, kernel_init=self.kernel_init
        )
        h = conv((3, 3), strides=self.stride, padding=1, name="conv1")(x)
        pair = functools.partial(NormActivation, activation=self.activation, order=self.order)
        h = pair(name="norm1")(h, train=train)
        h = conv((3, 3), padding=1, name="conv2")(h)
        if x.shape != h.shape and self.project:
            x = conv((1, 1), strides=self.stride, padding=0, use_bias=False, name="shortcut_conv")(x)
            x = BatchNorm(name="shortcut_norm")(x, train=train)
        elif x.shape != h.shape:
            half = (self.features - x.shape[-1]) // 2
            x = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (half, half)))
        if self.order == "swap":
            return pair(name="norm2")(h, train=train) + x
        out = submodule(self.activation, "shift2")(BatchNorm(name="norm2")(h, train=train) + x)
        sow_activations(self, out, out)
        return out


class ResNet(nn.Module):
    """See `resnet`."""

    num_classes: int | None
    layout: Layout
    order: Order
    activation: Activation
    use_bias: bool
    kernel_init: Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool) -> Outputs:
        chex.assert_rank(inputs, 4)
        stem = nn.Conv(
            self.layout.channels[0],
            (3, 3),
            padding=1,
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            name="stem",
        )
        pair = NormActivation(activation=self.activation, order=self.order, name="stem_norm")
        x = pair(stem(inputs.astype(self.dtype)), train=train)
        for group, (features, blocks) in enumerate(zip(self.layout.channels, self.layout.blocks), start=1):
            for block in range(1, blocks + 1):
                x = BasicBlock(
                    features=features,
                    stride=2 if group > 1 and block == 1 else 1,
                    project=self.layout.project,
                    order=self.order,
                    activation=self.activation,
                    use_bias=self.use_bias,
                    kernel_init=self.kernel_init,
                    dtype=self.dtype,
                    name=f"group{group}_block{block}",
                )(x, train=train)
        return classify(x.mean((1, 2), dtype=jnp.float32), self.num_classes, kernel_init=self.kernel_init)


def resnet(
    num_classes: int | None,
    *,
    depth: Literal[18, 20, 34],
    order: Order = "convention",
    activation: str | Activation = "relu",
    use_bias: bool | None = None,
    kernel_init: Initializer = HE_NORMAL,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """A CIFAR ResNet on images [B, H, W, C]; convolutions have symmetric padding.

    Args:
      num_classes: K, the number of logits; None: an encoder, which has no head and gives features only.
      depth: see the module's docstring for what each is.
      order: "convention": act(norm(conv)) inside a block and act(norm(conv) + shortcut) at its end, as in
        the paper. "swap": norm(act(conv)) inside, and norm(act(conv)) + shortcut at its end, so that every
        normalisation follows the activation which it otherwise precedes.
      activation: one of `jaxlab.nn.activations`, or its name.
      use_bias: whether 3×3 convolutions have a bias, which starts at 0; None: in the order "swap".
      kernel_init: of every kernel; the paper's own by default. The bias of the head starts at U(±1/√F).
      dtype: what the convolutions compute in; parameters, statistics, features and logits are float32.

    Raises:
      UserError: unknown activation.
    """
    module = ResNet(
        num_classes=num_classes,
        layout=LAYOUTS[depth],
        order=order,
        activation=activations.get(activation),
        use_bias=needs_bias(use_bias, order),
        kernel_init=kernel_init,
        dtype=jnp.dtype(dtype),
    )
    return from_linen(module)
