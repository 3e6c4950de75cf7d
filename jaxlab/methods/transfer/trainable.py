"""Which parameters of a network are trained: masks by the network's layers, and by the step.

A network's parameters are {module: ..., "head": ...}, as those of `jaxlab.nn`, or {"encoder": {module: ...},
"head": ...}. Modules of the encoder form blocks, from the bottom, the input, to the top: `stem*` is the
first, then those with numbers in their names in the order of these (`conv1` and `norm1` are one block), then
others.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping

import chex
import jax
import jax.numpy as jnp

from jaxlab.core import UserError
from jaxlab.core.errors import nearest

HEAD = "head"
# See `trainable_mask`.
Trainable = str | tuple | Callable[[jax.Array], jax.Array]

_NORM = re.compile(r"norm|(^|_)bn", re.IGNORECASE)


def is_normalization(names: Iterable[str]) -> bool:
    """Whether a parameter with these names on its path is of a normalisation."""
    return any(_NORM.search(name) for name in names)


def blocks(params: Mapping[str, chex.ArrayTree]) -> list[tuple[str, ...]]:
    """The names of the encoder's modules from bottom to top, those of one block together."""
    encoder = params.get("encoder", params)
    names = [name for name in encoder if name != HEAD] if isinstance(encoder, Mapping) else ["encoder"]
    depths = sorted({_depth(name) for name in names})
    return [tuple(sorted(name for name in names if _depth(name) == depth)) for depth in depths]


def _depth(name: str) -> tuple[float, ...]:
    if name.startswith("stem"):
        return (-math.inf,)
    return tuple(map(float, re.findall(r"\d+", name))) or (math.inf,)


def trainable_mask(
    params: Mapping[str, chex.ArrayTree], spec: Trainable, step: jax.Array | int | None = None
) -> chex.ArrayTree:
    """Which parameters are trained.

    Args:
      params: of a network, see this module's docstring.
      spec: "all"; "head"; "norm_only", the parameters of normalisations and no head; ("top_k", k), the head
        and the k uppermost blocks; ("bottom_k", k), the k lowest blocks and no head; names of modules or
        blocks of these, such as ("dense1", "head"), all of which are trained; or a schedule, `spec(step) ->
        k`, of ("top_k", k).
      step: what a schedule is called with; it and k may be traced.

    Returns:
      A tree of bools like `params`; of arrays where k is traced.

    Raises:
      UserError: a spec or a module that is not there, or a schedule without a step.
    """
    if callable(spec):
        if step is None:
            raise UserError("trainable: a schedule needs the step.")
        spec = ("top_k", spec(step))
    own_blocks = blocks(params)
    block_of = {name: i for i, names in enumerate(own_blocks) for name in names}
    if isinstance(spec, str):
        spec = (spec,)
    if len(spec) == 2 and spec[0] in ("top_k", "bottom_k"):
        end, k = spec
        if not isinstance(k, jax.Array) and not 0 <= k <= len(own_blocks):
            raise UserError(f"trainable: {end} is {k}; the encoder has {len(own_blocks)} blocks.")

        def is_trained(names: tuple[str, ...]) -> bool | jax.Array:
            block = next((block_of[name] for name in names if name in block_of), None)
            if block is None:
                return end == "top_k"
            return block >= len(own_blocks) - k if end == "top_k" else block < k

    else:
        known = ("all", "norm_only", HEAD, *params, *block_of)
        for name in spec:
            if name not in known:
                suggestion = nearest(str(name), known)
                modules = ", ".join(dict.fromkeys((HEAD, *params, *block_of)))
                raise UserError(
                    f"trainable: no '{name}'.{suggestion} It may be all, head, norm_only, ('top_k', k),"
                    f" ('bottom_k', k), or names of modules: {modules}."
                )

        def is_trained(names: tuple[str, ...]) -> bool:
            if "all" in spec or ("norm_only" in spec and is_normalization(names)):
                return True
            return not set(spec).isdisjoint(names[:2])

    def of_leaf(path: tuple, leaf: jax.Array) -> bool | jax.Array:
        return is_trained(tuple(str(getattr(entry, "key", entry)) for entry in path))

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def unfreeze_schedule(
    step: jax.Array | int, num_blocks: int, num_steps: int, warmup: int = 0, cooldown: int = 0
) -> jax.Array:
    """How many blocks, from the top, gradual unfreezing trains at a step.

    ⌊max(0, s - w) / (S' - 1) · L⌋ with S' = max(1, S - w - c), and L during the cool-down and where S' = 1;
    the head is always trained. As in the official code of LP-FT.

    Args:
      step: s, from 0; may be traced.
      num_blocks: L.
      num_steps: S.
      warmup: w, steps in which the head alone is trained.
      cooldown: c, steps at the end in which everything is.

    Returns:
      int32 scalar in 0..L.
    """
    active = max(1, num_steps - warmup - cooldown)
    since = jnp.maximum(0, jnp.asarray(step, jnp.int32) - warmup)
    tuned = jnp.minimum(since * num_blocks // max(1, active - 1), num_blocks)
    everything = (step >= num_steps - cooldown) | ((active == 1) & (step >= warmup))
    return jnp.where(everything, num_blocks, tuned)


def unfreeze_factor(
    step: jax.Array | int, num_steps: int, warmup: int = 0, cooldown: int = 0, gamma: float = 3.73
) -> jax.Array:
    """The factor of the learning rate that goes with `unfreeze_schedule`, exp(γ (1 - p)).

    p = max(0, s - w) / (S' - 1); the factor is 1 during the cool-down and where S' = 1.

    Returns:
      float32 scalar.
    """
    active = max(1, num_steps - warmup - cooldown)
    since = jnp.maximum(0, jnp.asarray(step, jnp.int32) - warmup)
    progress = jnp.minimum(since / max(1, active - 1), 1.0)
    is_one = (active == 1) | (step >= num_steps - cooldown)
    return jnp.where(is_one, 1.0, jnp.exp(gamma * (1 - progress)))
