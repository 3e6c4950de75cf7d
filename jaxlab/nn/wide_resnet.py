"""Wide residual networks for CIFAR (Zagoruyko and Komodakis, arXiv 1605.07146).

The variant which the out-of-distribution literature trains (Outlier Exposure, arXiv 1812.04606, and after
it): where a block changes the number of channels its shortcut projects the *activated* input.
"""

import functools
from typing import Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlab.core import Network, Outputs, UserError
from jaxlab.nn import activations
from jaxlab.nn.activations import Activation
from jaxlab.nn.layers import HE_NORMAL_FAN_OUT, classify
from jaxlab.nn.linen import from_linen
from jaxlab.nn.normalization import NormActivation, Order, needs_bias


class WideBlock(nn.Module):
    """A pre-activation block with dropout between its two 3×3 convolutions."""

    features: int
    stride: int
    dropout_rate: float
    order: Order
    activation: Activation
    use_bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = functools.partial(
            nn.Conv, self.features, use_bias=self.use_bias, dtype=self.dtype, kernel_init=HE_NORMAL_FAN_OUT
        )
        pair = functools.partial(NormActivation, activation=self.activation, order=self.order)
        activated = pair(name="norm1")(x, train=train)
        h = conv((3, 3), strides=self.stride, padding=1, name="conv1")(activated)
        h = pair(name="norm2")(h, train=train)
        h = nn.Dropout(self.dropout_rate, deterministic=not train)(h)
        h = conv((3, 3), padding=1, name="conv2")(h)
        if x.shape[-1] != self.features:  # the bias of conv2 serves both
            shortcut = conv((1, 1), strides=self.stride, padding=0, use_bias=False, name="shortcut")
            x = shortcut(activated)
        return x + h


class WideResNet(nn.Module):
    """See `wide_resnet`."""

    num_classes: int | None
    blocks: int  # in each of the three groups
    widen_factor: int
    dropout_rate: float
    order: Order
    activation: Activation
    use_bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool) -> Outputs:
        chex.assert_rank(inputs, 4)
        stem = nn.Conv(
            16,
            (3, 3),
            padding=1,
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=HE_NORMAL_FAN_OUT,
            name="stem",
        )
        x = stem(inputs.astype(self.dtype))
        for group, stride in enumerate((1, 2, 2)):
            for block in range(self.blocks):
                x = WideBlock(
                    features=16 * 2**group * self.widen_factor,
                    stride=stride if block == 0 else 1,
                    dropout_rate=self.dropout_rate,
                    order=self.order,
                    activation=self.activation,
                    use_bias=self.use_bias,
                    dtype=self.dtype,
                    name=f"group{group + 1}_block{block + 1}",
                )(x, train=train)
        x = NormActivation(activation=self.activation, order=self.order, name="norm")(x, train=train)
        features = x.mean((1, 2), dtype=jnp.float32)
        return classify(features, self.num_classes, bias_init=nn.initializers.zeros)


def wide_resnet(
    num_classes: int | None,
    *,
    depth: int = 40,
    widen_factor: int = 2,
    dropout_rate: float = 0.3,
    order: Order = "convention",
    activation: str | Activation = "relu",
    use_bias: bool | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """A WRN-`depth`-`widen_factor` on images [B, H, W, C]; convolutions have symmetric padding.

    Args:
      num_classes: K, the number of logits; None: an encoder, which has no head and gives features only.
      depth: 6n + 4, for n blocks in each of the three groups.
      widen_factor: k; the groups have 16k, 32k and 64k channels.
      dropout_rate: the share of units that training drops between the two convolutions of a block.
      order: whether batch normalisation stands before ("convention") or after ("swap") the activation, in
        every pair of them.
      activation: one of `jaxlab.nn.activations`, or its name.
      use_bias: whether 3×3 convolutions have a bias, which starts at 0; None: in the order "swap".
      dtype: what the convolutions compute in; parameters, statistics, features and logits are float32.

    Raises:
      UserError: unknown activation, or a depth that is not 6n + 4.
    """
    if depth < 10 or depth % 6 != 4:
        raise UserError(f"network.depth: a wide ResNet has 6n + 4 layers (10, 16, ..., 40), got {depth}.")
    module = WideResNet(
        num_classes=num_classes,
        blocks=(depth - 4) // 6,
        widen_factor=widen_factor,
        dropout_rate=dropout_rate,
        order=order,
        activation=activations.get(activation),
        use_bias=needs_bias(use_bias, order),
        dtype=jnp.dtype(dtype),
    )
    return from_linen(module)
