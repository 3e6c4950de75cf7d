"""A multi-layer perceptron."""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from jaxlab.core import Network, Outputs
from jaxlab.nn.layers import FAN_IN_UNIFORM, activation_function, classify, dense
from jaxlab.nn.linen import from_linen
from jaxlab.nn.normalization import NormOrder, norm_activation


class MLP(nn.Module):
    """See `mlp`."""

    num_classes: int | None
    hidden: tuple[int, ...]
    norm: str | None
    norm_order: NormOrder
    activation: Callable[[jax.Array], jax.Array]
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
                x = self.activation(x)
            else:
                x = norm_activation(
                    x,
                    activation=self.activation,
                    norm_order=self.norm_order,
                    train=train,
                    name=f"norm{i}",
                )
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return classify(x, self.num_classes, kernel_init=self.kernel_init, bias_init=self.bias_init)


def mlp(
    num_classes: int | None,
    *,
    hidden: tuple[int, ...] = (128,),
    norm: Literal["batch_norm"] | None = None,
    norm_order: NormOrder = "before",
    activation: str = "relu",
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
      norm_order: whether it stands before or after the activation.
      activation: the name of an activation in `jax.nn`.
      use_bias: whether the hidden layers have a bias. None: they do, unless a normalisation follows
        immediately, which would cancel it.
      dropout_rate: the share of hidden units, after activation and normalisation, that training drops.
      kernel_init: of every kernel.
      bias_init: of every bias; U(±1/√fan_in) if None.
      dtype: what the hidden layers compute in; parameters, statistics, features and logits are float32.

    Raises:
      UserError: unknown activation.
    """
    if use_bias is None:
        use_bias = norm is None or norm_order == "after"
    module = MLP(
        num_classes=num_classes,
        hidden=hidden,
        norm=norm,
        norm_order=norm_order,
        activation=activation_function(activation),
        use_bias=use_bias,
        dropout_rate=dropout_rate,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=jnp.dtype(dtype),
    )
    return from_linen(module)
