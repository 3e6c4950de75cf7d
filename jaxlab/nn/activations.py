"""Activations by name; shifted ones, and ones whose shift is learned.

The bounded functions are those of Kim, Kim & Kim, *Tanh Works Better With Asymmetry*, NeurIPS 2023, which
names tanh, LeCun's tanh, softsign and a shifted tanh, with controls and peers.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlab.core import UserError
from jaxlab.core.errors import nearest

Activation = Callable[[jax.Array], jax.Array]  # elementwise; a Linen module where it has parameters

_LECUN_GAIN, _LECUN_SLOPE = 1.7159, 2 / 3  # LeCun, Bottou, Orr & Müller, "Efficient BackProp", 1998


def lecun_tanh(x: jax.Array) -> jax.Array:
    """1.7159 tanh(2x/3): ±1 at ±1."""
    return _LECUN_GAIN * jnp.tanh(_LECUN_SLOPE * x)


def lecun_hard_tanh(x: jax.Array) -> jax.Array:
    """1.7159 clip(2x/3, -1, 1)."""
    return _LECUN_GAIN * jax.nn.hard_tanh(_LECUN_SLOPE * x)


def penalized_tanh(x: jax.Array, *, slope: float = 0.25) -> jax.Array:
    """tanh x, below zero times `slope` (Xu, Huang & Li, arXiv 1602.05980)."""
    y = jnp.tanh(x)
    return jnp.where(x > 0, y, slope * y)


_ACTIVATIONS: dict[str, Activation] = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "lecun_tanh": lecun_tanh,
    "softsign": jax.nn.soft_sign,
    "soft_sign": jax.nn.soft_sign,  # as JAX spells it
    "hard_tanh": jax.nn.hard_tanh,
    "lecun_hard_tanh": lecun_hard_tanh,
    "arctan": jnp.arctan,
    "sigmoid": jax.nn.sigmoid,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "penalized_tanh": penalized_tanh,
}
_SHIFTED = "shifted_"


def get(name: str | Activation, **kw: Any) -> Activation:
    """The activation of this name.

    Args:
      name: one of the table above, or "shifted_" and such a name, which is `shifted` by 1 unless `kw` says
        otherwise. A function is returned as it is.
      **kw: arguments of the function beside its input, such as `negative_slope` of leaky_relu; `shift` and
        `offset` of a shifted one.

    Raises:
      UserError: no such name, or it takes no such argument.
    """
    if not isinstance(name, str):
        return functools.partial(name, **kw) if kw else name
    if name.startswith(_SHIFTED):
        kw = {"shift": 1.0, **kw}
        function: Callable[..., Any] = functools.partial(shifted, get(name.removeprefix(_SHIFTED)))
    elif name in _ACTIVATIONS:
        function = functools.partial(_ACTIVATIONS[name], 0.0)
    else:
        raise UserError(
            f"network.activation: no '{name}'.{nearest(name, _ACTIVATIONS)} It may be:"
            f" {', '.join(_ACTIVATIONS)}, or one of them behind '{_SHIFTED}'."
        )
    try:
        inspect.signature(function).bind(**kw)
    except TypeError as error:
        raise UserError(f"network.activation: '{name}': {error}.") from error
    if name.startswith(_SHIFTED):
        return function(**kw)
    return functools.partial(_ACTIVATIONS[name], **kw) if kw else _ACTIVATIONS[name]


def shifted(
    f: str | Activation, shift: float | jax.Array, offset: float | jax.Array | Literal["origin"] = 0.0
) -> Activation:
    """f(x + shift) + offset.

    The paper's Shifted Tanh is of this family; its shift is not known, 1 is this project's.

    Args:
      f: an activation or the name of one.
      shift: of the input; fixed, one for all channels or one each, [C].
      offset: of the output; "origin": -f(shift), so that 0 stays 0. Batch normalisation right behind the
        activation removes it.
    """
    f = get(f)

    def activation(x: jax.Array) -> jax.Array:
        y = f(x + shift)
        return y - f(jnp.asarray(shift, y.dtype)) if isinstance(offset, str) else y + offset

    if isinstance(offset, str) and offset != "origin":
        raise UserError(f"network.activation.offset: expected a number or 'origin', got '{offset}'.")
    return activation


class LearnableShift(nn.Module):
    """f(x + s) with a trained s.

    Attributes:
      f: an activation or the name of one.
      init_shift: where s starts.
      per_channel: whether each channel (the last axis) has an s of its own, or all share one.
    """

    f: str | Activation
    init_shift: float = 0.0
    per_channel: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:] if self.per_channel else ()
        shift = self.param("shift", nn.initializers.constant(self.init_shift), shape, jnp.float32)
        return get(self.f)(x + shift.astype(x.dtype))


def submodule(activation: Activation, name: str) -> Activation:
    """An activation with parameters as the submodule `name` of the calling module; any other as it is."""
    return activation.copy(name=name) if isinstance(activation, nn.Module) else activation
