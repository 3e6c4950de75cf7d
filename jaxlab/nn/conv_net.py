"""A small plain convolutional network."""

from collections.abc import Callable
from typing import Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlab.core import Network, Outputs, UserError
from jaxlab.nn.layers import FAN_IN_UNIFORM, activation_function, classify
from jaxlab.nn.linen import from_linen
from jaxlab.nn.normalization import NormOrder, norm_activation


class ConvNet(nn.Module):
    """See `conv_net`."""

    num_classes: int | None
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    norm_order: NormOrder
    activation: Callable[[jax.Array], jax.Array]
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
                use_bias=False,
                dtype=self.dtype,
                kernel_init=FAN_IN_UNIFORM,
                name=f"conv{i}",
            )
            x = norm_activation(
                conv(x),
                activation=self.activation,
                norm_order=self.norm_order,
                train=train,
                name=f"norm{i}",
            )
        return classify(x.mean((1, 2), dtype=jnp.float32), self.num_classes)


def conv_net(
    num_classes: int | None,
    *,
    channels: tuple[int, ...] = (16, 32, 64),
    strides: tuple[int, ...] = (1, 2, 2),
    norm_order: NormOrder = "before",
    activation: str = "relu",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """3×3 convolutions, each with batch normalisation and activation, then the global mean, on [B, H, W, C].

    Convolutions have no bias and symmetric padding 1; initialised as PyTorch does by default.

    Args:
      num_classes: K, the number of logits; None: an encoder, which has no head and gives features only.
      channels: of each convolution.
      strides: of each convolution.
      norm_order: whether batch normalisation stands before or after the activation.
      activation: the name of an activation in `jax.nn`.
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
        norm_order=norm_order,
        activation=activation_function(activation),
        dtype=jnp.dtype(dtype),
    )
    return from_linen(module)
