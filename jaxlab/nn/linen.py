"""From a Flax Linen module to a `Network`."""

import flax.errors
import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp

from jaxlab.core import Network


def from_linen(module: nn.Module) -> Network:
    """Wraps a Linen module as a `Network`.

    Args:
      module: its `__call__(inputs, *, train: bool)` returns a dict, a classifier's with at least
        `"logits"` [B, K] and `"features"` [B, F]. It keeps running statistics in the collection
        `batch_stats` (which only training updates) and draws dropout from the stream `dropout`.

    Returns:
      A `Network`. Its variables are plain dicts; its logits are float32, whatever the module computes in.
      Where its variables are given with an empty collection `intermediates`, its outputs have `activations`:
      a tuple, in the order of the layers, of dicts of what each sows (see `sow_activations`).
      `apply` raises `ValueError` where the module draws random numbers and no key is given.
    """

    def init(key, inputs):
        return module.init(key, inputs, train=False)

    def apply(variables, inputs, *, train, key=None):
        mutable = {"batch_stats", "intermediates"} if train else {"intermediates"}
        mutable = [name for name in variables if name in mutable]
        rngs = {} if key is None else {"dropout": key}
        try:
            outputs, updates = module.apply(variables, inputs, train=train, rngs=rngs, mutable=mutable)
        except flax.errors.InvalidRngError as error:
            if key is not None:
                raise
            name = type(module).__name__
            raise ValueError(f"{name} draws random numbers (dropout): apply needs `key`.") from error
        if "intermediates" in variables:
            sown = flax.traverse_util.flatten_dict(updates.pop("intermediates", {}))
            layers = tuple(layer for of_one in sown.values() for layer in of_one)  # one may be called twice
            outputs = {**outputs, "activations": layers}
        if "logits" in outputs:
            outputs = {**outputs, "logits": jnp.asarray(outputs["logits"], jnp.float32)}
        return outputs, {**variables, **updates} if updates else variables

    return Network(init, apply)
