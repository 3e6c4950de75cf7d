"""Batch normalisation, and where it stands beside the activation."""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

NormOrder = Literal["before", "after"]  # the normalisation stands before, or after, the activation


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as PyTorch computes it (arXiv 1502.03167).

    A training batch is normalised with its biased variance, while the running variance follows the
    unbiased one, n/(n-1) times as large; Flax's own `BatchNorm` puts the biased one in both places.
    Statistics and arithmetic are float32, the output has the dtype of the input. The statistics are
    those of the global batch: under `jit` over a mesh the compiler reduces across devices.

    Attributes:
      momentum: the weight of the old running value (1 minus PyTorch's `momentum`).
      epsilon: added to the variance.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

        x32 = x.astype(jnp.float32)
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = x32.mean(axes)
            var = jnp.square(x32 - mean).mean(axes)
            n = x.size // x.shape[-1]
            unbiased_var = var * (n / max(n - 1, 1))  # the variance of a single value is 0
            running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
            running_var.value = self.momentum * running_var.value + (1 - self.momentum) * unbiased_var
        else:
            mean, var = running_mean.value, running_var.value
        y = (x32 - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.astype(x.dtype)


def norm_activation(
    x: jax.Array,
    *,
    activation: Callable[[jax.Array], jax.Array],
    norm_order: NormOrder,
    train: bool,
    name: str,
) -> jax.Array:
    """Batch normalisation (the submodule `name` of the calling module) and activation, in either order."""
    norm = BatchNorm(name=name)
    if norm_order == "before":
        return activation(norm(x, train=train))
    return norm(activation(x), train=train)
