"""What the networks share: initialisation, the linear head."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, variance_scaling

from jaxlab.core import Outputs

# U(±1/√fan_in), with which PyTorch starts the kernels of linear and convolutional layers.
FAN_IN_UNIFORM: Initializer = variance_scaling(1 / 3, "fan_in", "uniform")
# He et al., arXiv 1502.01852, equation 10; not truncated, as JAX's own `he_normal` is.
HE_NORMAL: Initializer = variance_scaling(2.0, "fan_in", "normal")
# The same by what leaves a layer: N(0, 2 / (k·k·out)), with which many networks for small images start.
HE_NORMAL_FAN_OUT: Initializer = variance_scaling(2.0, "fan_out", "normal")


def symmetric_uniform(bound: float) -> Initializer:
    """U(-bound, bound)."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def dense(
    x: jax.Array,
    features: int,
    *,
    name: str,
    use_bias: bool = True,
    kernel_init: Initializer = FAN_IN_UNIFORM,
    bias_init: Initializer | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """A linear layer (the submodule `name` of the calling module) that starts as PyTorch's does.

    Args:
      x: [..., D].
      features: F, the size of the output [..., F].
      name: the submodule's name.
      use_bias: whether there is a bias.
      kernel_init: of the kernel [D, F].
      bias_init: of the bias [F]; U(±1/√D) if None.
      dtype: what it computes in; its parameters are float32.
    """
    bias_init = bias_init or symmetric_uniform(x.shape[-1] ** -0.5)
    layer = nn.Dense(
        features, use_bias=use_bias, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name=name
    )
    return layer(x)


def classify(
    features: jax.Array,
    num_classes: int | None,
    *,
    kernel_init: Initializer = FAN_IN_UNIFORM,
    bias_init: Initializer | None = None,
) -> Outputs:
    """A network's outputs: the features [B, F] and the logits [B, K] of the layer `head`, in float32.

    Without `num_classes` there is no head and there are no logits.
    """
    features = features.astype(jnp.float32)
    if num_classes is None:
        return {"features": features}
    logits = dense(features, num_classes, name="head", kernel_init=kernel_init, bias_init=bias_init)
    return {"logits": logits, "features": features}
