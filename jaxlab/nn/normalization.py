"""Batch normalisation, and where it stands beside the activation."""

from collections.abc import Mapping
from typing import Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlab.core import UserError
from jaxlab.nn import activations
from jaxlab.nn.activations import Activation, submodule

# "convention": σ(BN(conv(x))); "swap": BN(σ(conv(x))).
Order = Literal["convention", "swap"]


def batch_norm(
    x: jax.Array,
    params: Mapping[str, jax.Array],
    state: Mapping[str, jax.Array],
    *,
    train: bool,
    momentum: float = 0.9,
    eps: float = 1e-5,
    axis_name: str | None = None,
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Batch normalisation over all axes but the last, as PyTorch computes it (arXiv 1502.03167).

    A training batch is normalised with its biased variance, while the running variance follows the
    unbiased one, n/(n-1) times as large; Flax's own `BatchNorm` puts the biased one in both places.
    Statistics and arithmetic are float32, the output has the dtype of the input.

    Args:
      x: [..., C].
      params: `scale` and `bias`, [C].
      state: the running `mean` and `var`, [C].
      train: whether to normalise with the batch's statistics and update the running ones.
      momentum: the weight of the old running value (1 minus PyTorch's `momentum`).
      eps: added to the variance.
      axis_name: the mapped axis that the batch is split over, under `pmap` or `shard_map`; under `jit`
        the statistics are those of the global batch without one.

    Returns:
      The output [..., C], and the new running statistics.
    """
    x32 = x.astype(jnp.float32)
    mean, var = state["mean"], state["var"]
    if train:
        axes = tuple(range(x.ndim - 1))
        n = x.size // x.shape[-1]
        mean = x32.mean(axes)
        if axis_name is not None:
            n = n * jax.lax.axis_size(axis_name)
            mean = jax.lax.pmean(mean, axis_name)
        var = jnp.square(x32 - mean).mean(axes)
        if axis_name is not None:
            var = jax.lax.pmean(var, axis_name)
        unbiased_var = var * (n / max(n - 1, 1))  # the variance of a single value is 0
        state = {
            "mean": momentum * state["mean"] + (1 - momentum) * mean,
            "var": momentum * state["var"] + (1 - momentum) * unbiased_var,
        }
    y = (x32 - mean) * (jax.lax.rsqrt(var + eps) * params["scale"]) + params["bias"]
    return y.astype(x.dtype), state


def norm_act_block(
    x: jax.Array,
    kernel: jax.Array,
    bn_params: Mapping[str, jax.Array],
    bn_state: Mapping[str, jax.Array],
    *,
    order: Order,
    activation: str | Activation,
    train: bool,
    bias: jax.Array | None = None,
    momentum: float = 0.9,
    eps: float = 1e-5,
    axis_name: str | None = None,
) -> tuple[jax.Array, Mapping[str, jax.Array], dict[str, jax.Array]]:
    """A convolution or dense layer with batch normalisation and activation, in either order.

    Args:
      x: images [N, H, W, Cin], or rows [N, D].
      kernel: [kh, kw, Cin, C] with odd kh and kw, applied with stride 1 to zero-padded images of their own
        size; or [D, C].
      bn_params, bn_state, train, momentum, eps, axis_name: of `batch_norm`.
      order: "convention": y = σ(BN(conv(x))); "swap": y = BN(σ(conv(x))).
      activation: σ, a function or the name of one.
      bias: [C] of the convolution; in the order "convention" normalisation cancels it.

    Returns:
      y [N, H, W, C] or [N, C]; the new running statistics; and `act`, the output of σ, with `out`, y itself.

    Raises:
      UserError: unknown order or activation.
    """
    chex.assert_rank(kernel, x.ndim)
    activation = activations.get(activation)
    if x.ndim == 2:
        h = x @ kernel
    else:
        dimensions = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
    if bias is not None:
        h = h + bias
    settings = dict(train=train, momentum=momentum, eps=eps, axis_name=axis_name)
    if order == "convention":
        h, bn_state = batch_norm(h, bn_params, bn_state, **settings)
        act = y = activation(h)
    elif order == "swap":
        act = activation(h)
        y, bn_state = batch_norm(act, bn_params, bn_state, **settings)
    else:
        raise UserError(f"order: expected 'convention' or 'swap', got {order!r}.")
    return y, bn_state, {"act": act, "out": y}


def needs_bias(use_bias: bool | None, order: Order) -> bool:
    """Whether a layer in front of the pair has a bias: by default where no normalisation cancels it."""
    return order == "swap" if use_bias is None else use_bias


class BatchNorm(nn.Module):
    """`batch_norm` with its parameters and, in the collection `batch_stats`, its statistics.

    The statistics are those of the global batch: under `jit` over a mesh the compiler reduces across devices.

    Attributes:
      momentum: the weight of the old running value.
      epsilon: added to the variance.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        shape = x.shape[-1:]
        params = {
            "scale": self.param("scale", nn.initializers.ones, shape, jnp.float32),
            "bias": self.param("bias", nn.initializers.zeros, shape, jnp.float32),
        }
        running = {
            "mean": self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32),
            "var": self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32),
        }
        state = {name: variable.value for name, variable in running.items()}
        y, state = batch_norm(x, params, state, train=train, momentum=self.momentum, eps=self.epsilon)
        if train:
            for name, variable in running.items():
                variable.value = state[name]
        return y


class NormActivation(BatchNorm, kw_only=True):
    """Batch normalisation and activation, in either order; both outputs are sown, see `sow_activations`."""

    activation: Activation
    order: Order

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        activation = submodule(self.activation, "shift")
        if self.order == "convention":
            normalized = super().__call__(x, train=train)
            out = activation(normalized)
            sow_activations(self, out, out, norm_in=x, norm_out=normalized)
        else:
            act = activation(x)
            out = super().__call__(act, train=train)
            sow_activations(self, act, out)
        return out


def sow_activations(
    module: nn.Module, act: jax.Array, out: jax.Array, name: str = "activations", **others: jax.Array
) -> None:
    """Hands out `act`, the output of an activation, and `out`, what the next layer receives, if asked for.

    `others` are of the same shape: `norm_in` and `norm_out`, before and behind a normalisation that stands in
    front of the activation. See `jaxlab.nn.from_linen` for how to ask; nothing is computed or kept where
    nobody does.
    """
    module.sow("intermediates", name, {"act": act, "out": out, **others})
