"""Which parameters weight decay pulls towards zero."""

import functools
from collections.abc import Callable, Mapping

import chex


def weight_decay_mask(params: chex.ArrayTree, exclude_norm: bool, exclude_bias: bool) -> chex.ArrayTree:
    """Tells for each parameter of a network of `jaxlab.nn` whether it decays, for `mask` in optax.

    Args:
      params: nested dicts of a layer's parameters.
      exclude_norm: spare scale and bias of normalisation layers, the layers that have a `scale`.
      exclude_bias: spare the biases of all layers, and learned shifts of activations, which are biases.

    Returns:
      The same tree with a bool in place of each array.
    """
    is_norm = "scale" in params
    spared = {
        "scale": exclude_norm,
        "bias": exclude_bias or (is_norm and exclude_norm),
        "shift": exclude_bias,
    }
    return {
        name: weight_decay_mask(value, exclude_norm, exclude_bias)
        if isinstance(value, Mapping)
        else not spared.get(name, False)
        for name, value in params.items()
    }


def spare(*, norm: bool = False, bias: bool = False) -> Callable[[chex.ArrayTree], chex.ArrayTree]:
    """`weight_decay_mask` as a function of the parameters alone, as a config's optimizer takes it:

      dict(name="add_decayed_weights", weight_decay=5e-4,
           mask=dict(name="jaxlab.nn.weight_decay:spare", norm=True))

    Args:
      norm: `exclude_norm`.
      bias: `exclude_bias`.
    """
    return functools.partial(weight_decay_mask, exclude_norm=norm, exclude_bias=bias)
