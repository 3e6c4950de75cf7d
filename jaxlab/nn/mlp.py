"""A multi-layer perceptron."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from jaxlab.core import Network, Outputs
from jaxlab.nn import activations
from jaxlab.nn.activations import Activation, submodule
from jaxlab.nn.layers import FAN_IN_UNIFORM, classify, dense
from jaxlab.nn.linen import from_linen
from jaxlab.nn.normalization import NormActivation, Order, needs_bias, sow_activations


class MLP(nn.Module):
    """See `mlp`."""

    num_classes: int | None
    hidden: tuple[int, ...]
    norm: str | None
    order: Order
    activation: Activation
    use_bias: bool
    dropout_rate: float
    kernel_init: Initializer
    bias_init: Initializer | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool) -> Outputs:
        x = inputs.reshape(len(inputs), -1).astype(self.dtype)
        for i, features in enumerate(self.hidden, start=1):
            x = dense(
                x,
                features,
                name=f"dense{i}",
                use_bias=self.use_bias,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                dtype=self.dtype,
            )
            if self.norm is None:
                x = submodule(self.activation, f"shift{i}")(x)
                sow_activations(self, x, x, f"activations{i}")
            else:
                pair = NormActivation(activation=self.activation, order=self.order, name=f"norm{i}")
                x = pair(x, train=train)
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return classify(x, self.num_classes, kernel_init=self.kernel_init, bias_init=self.bias_init)


def mlp(
    num_classes: int | None,
    *,
    hidden: tuple[int, ...] = (128,),
    norm: Literal["batch_norm"] | None = None,
    order: Order = "convention",
    activation: str | Activation = "relu",
    use_bias: bool | None = None,
    dropout_rate: float = 0.0,
    kernel_init: Initializer = FAN_IN_UNIFORM,
    bias_init: Initializer | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """A multi-layer perceptron on flattened inputs [B, ...], initialised as PyTorch does by default.

    Args:
      num_classes: K, the number of logits; None: an encoder, which has no head and gives features only.
      hidden: the width of each hidden layer; none gives a linear classifier.
      norm: the normalisation of each hidden layer, if any.
      order: whether it stands before ("convention") or after ("swap") the activation.
      activation: one of `jaxlab.nn.activations`, or its name.
      use_bias: whether the hidden layers have a bias. None: they do, unless a normalisation follows
        immediately, which would cancel it.
      dropout_rate: the share of hidden units, after activation and normalisation, that training drops.
      kernel_init: of every kernel.
      bias_init: of every bias; U(±1/√fan_in) if None.
      dtype: what the hidden layers compute in; parameters, statistics, features and logits are float32.

    Raises:
      UserError: unknown activation.
    """
    module = MLP(
        num_classes=num_classes,
        hidden=hidden,
        norm=norm,
        order=order,
        activation=activations.get(activation),
        use_bias=needs_bias(use_bias, order if norm else "swap"),
        dropout_rate=dropout_rate,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=jnp.dtype(dtype),
    )
    return from_linen(module)
