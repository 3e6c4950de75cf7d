"""A small plain convolutional network."""

from typing import Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlab.core import Network, Outputs, UserError
from jaxlab.nn import activations
from jaxlab.nn.activations import Activation
from jaxlab.nn.layers import FAN_IN_UNIFORM, classify, symmetric_uniform
from jaxlab.nn.linen import from_linen
from jaxlab.nn.normalization import NormActivation, Order, needs_bias


class ConvNet(nn.Module):
    """See `conv_net`."""

    num_classes: int | None
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    order: Order
    activation: Activation
    use_bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool) -> Outputs:
        chex.assert_rank(inputs, 4)
        x = inputs.astype(self.dtype)
        for i, (features, stride) in enumerate(zip(self.channels, self.strides), start=1):
            conv = nn.Conv(
                features,
                (3, 3),
                strides=stride,
                padding=1,
                use_bias=self.use_bias,
                dtype=self.dtype,
                kernel_init=FAN_IN_UNIFORM,
                bias_init=symmetric_uniform((9 * x.shape[-1]) ** -0.5),
                name=f"conv{i}",
            )
            pair = NormActivation(activation=self.activation, order=self.order, name=f"norm{i}")
            x = pair(conv(x), train=train)
        return classify(x.mean((1, 2), dtype=jnp.float32), self.num_classes)


def conv_net(
    num_classes: int | None,
    *,
    channels: tuple[int, ...] = (16, 32, 64),
    strides: tuple[int, ...] = (1, 2, 2),
    order: Order = "convention",
    activation: str | Activation = "relu",
    use_bias: bool | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """3×3 convolutions, each with batch normalisation and activation, then the global mean, on [B, H, W, C].

    Convolutions have symmetric padding 1; initialised as PyTorch does by default.

    Args:
      num_classes: K, the number of logits; None: an encoder, which has no head and gives features only.
      channels: of each convolution.
      strides: of each convolution.
      order: whether batch normalisation stands before ("convention") or after ("swap") the activation.
      activation: one of `jaxlab.nn.activations`, or its name.
      use_bias: whether convolutions have a bias; None: in the order "swap", where nothing cancels it.
      dtype: what the convolutions compute in; parameters, statistics, features and logits are float32.

    Raises:
      UserError: unknown activation, or not one stride for each convolution.
    """
    if len(channels) != len(strides):
        raise UserError(f"network.strides: {strides} must have one entry for each of channels={channels}.")
    module = ConvNet(
        num_classes=num_classes,
        channels=channels,
        strides=strides,
        order=order,
        activation=activations.get(activation),
        use_bias=needs_bias(use_bias, order),
        dtype=jnp.dtype(dtype),
    )
    return from_linen(module)
