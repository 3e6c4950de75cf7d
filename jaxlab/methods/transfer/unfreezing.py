"""Fine-tuning that does not move all layers alike: gradual unfreezing, and Auto-RGN of surgical fine-tuning.

Both are optimizers around another, on `fine_tune.fine_tune`. Fine-tuning of chosen layers alone, surgical
fine-tuning proper, is `fine_tune.fine_tune` with their names as `trainable`.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jaxlab.core import Method, Network, UserError
from jaxlab.methods.transfer.phases import BatchNormMode, Phase, in_phases
from jaxlab.methods.transfer.trainable import (
    blocks,
    is_normalization,
    trainable_mask,
    unfreeze_factor,
    unfreeze_schedule,
)


class UnfreezingState(NamedTuple):
    """int32, the number of updates made, and the optimizer's own state."""

    step: jax.Array
    inner: optax.OptState


def gradually_unfrozen(
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    warmup: int = 0,
    cooldown: int = 0,
    gamma: float | None = None,
) -> optax.GradientTransformation:
    """The optimizer on the blocks that `unfreeze_schedule` has reached; the others stay, their gradient is 0.

    Args:
      optimizer: what moves the parameters.
      num_steps, warmup, cooldown: see `unfreeze_schedule`.
      gamma: of `unfreeze_factor`, which multiplies the moves; None: the factor is 1.

    Raises:
      UserError: a length below 0, or warm-up and cool-down longer than all steps.
    """
    if min(warmup, cooldown) < 0 or warmup + cooldown > num_steps:
        raise UserError(
            f"gradual_unfreezing: warmup {warmup} and cooldown {cooldown} must fit into {num_steps} steps."
        )

    def init(params: chex.ArrayTree) -> UnfreezingState:
        return UnfreezingState(jnp.zeros((), jnp.int32), optimizer.init(params))

    def update(
        gradient: chex.ArrayTree, state: UnfreezingState, params: chex.ArrayTree
    ) -> tuple[chex.ArrayTree, UnfreezingState]:
        def reached(step: jax.Array) -> jax.Array:
            return unfreeze_schedule(step, len(blocks(params)), num_steps, warmup, cooldown)

        mask = trainable_mask(params, reached, state.step)
        factor = 1.0 if gamma is None else unfreeze_factor(state.step, num_steps, warmup, cooldown, gamma)
        gradient = jax.tree.map(lambda trained, g: jnp.where(trained, g, 0), mask, gradient)
        moves, inner = optimizer.update(gradient, state.inner, params)
        moves = jax.tree.map(lambda trained, move: jnp.where(trained, factor * move, 0), mask, moves)
        return moves, UnfreezingState(state.step + 1, inner)

    return optax.GradientTransformation(init, update)


def gradual_unfreezing(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    warmup: int = 0,
    cooldown: int = 0,
    gamma: float | None = None,
    pretrained_network: Network | None = None,
    batch_norm: BatchNormMode = "train",
) -> Method:
    """Fine-tunes from the top, a block after the other, as the code of LP-FT does (Howard & Ruder, ACL 2018).

    Args:
      network, optimizer, pretrained_network, batch_norm: see `fine_tune.fine_tune`.
      steps: of the whole training.
      warmup, cooldown, gamma: see `gradually_unfrozen`.
    """
    optimizer = gradually_unfrozen(optimizer, num_steps=steps, warmup=warmup, cooldown=cooldown, gamma=gamma)
    return in_phases(
        network, (Phase(optimizer, batch_norm=batch_norm),), pretrained_network=pretrained_network
    )


def relative_grad_norms(params: chex.ArrayTree, grads: chex.ArrayTree) -> chex.ArrayTree:
    """‖∇‖₂ / ‖θ‖₂ of each tensor, a tree of scalars; 0 of one that is all zeros."""

    def of_leaf(w: jax.Array, g: jax.Array) -> jax.Array:
        size = jnp.linalg.norm(w)
        return jnp.where(size > 0, jnp.linalg.norm(g) / jnp.where(size > 0, size, 1.0), 0.0)

    return jax.tree.map(of_leaf, params, grads)


class RelativeState(NamedTuple):
    """int32, the number of updates made; the sum of the relative norms of this epoch; the optimizer's own."""

    step: jax.Array
    sums: chex.ArrayTree
    inner: optax.OptState


def by_relative_gradient(
    optimizer: optax.GradientTransformation, *, epoch_steps: int, measured_batches: int = 5
) -> optax.GradientTransformation:
    """Auto-RGN (Lee et al., *Surgical Fine-Tuning Improves Adaptation to Distribution Shifts*, ICLR 2023).

    Each epoch begins with `measured_batches` updates that move nothing and average `relative_grad_norms`;
    the moves of the rest of it are multiplied by g / max g, tensor by tensor, and made by a fresh optimizer.
    Normalisations are not moved. Code of its authors: anniesch/surgical-finetuning, which measures on batches
    beside the epoch's own.

    Args:
      optimizer: Adam in that code.
      epoch_steps: updates of an epoch, those that measure included.
      measured_batches: 5 in that code.

    Raises:
      UserError: an epoch has no update left.
    """
    if not 0 < measured_batches < epoch_steps:
        raise UserError(
            f"auto_rgn: measured_batches is {measured_batches}; it must be in 1..{epoch_steps - 1}, below"
            " epoch_steps."
        )

    def init(params: chex.ArrayTree) -> RelativeState:
        sums = jax.tree.map(lambda w: jnp.zeros((), w.dtype), params)
        return RelativeState(jnp.zeros((), jnp.int32), sums, optimizer.init(params))

    def update(
        gradient: chex.ArrayTree, state: RelativeState, params: chex.ArrayTree
    ) -> tuple[chex.ArrayTree, RelativeState]:
        position = state.step % epoch_steps
        measures = position < measured_batches

        def add(path: tuple, total: jax.Array, ratio: jax.Array) -> jax.Array:
            is_norm = is_normalization(str(entry.key) for entry in path)
            kept = jnp.where(position == 0, 0.0, total)
            return jnp.zeros_like(total) if is_norm else jnp.where(measures, kept + ratio, total)

        ratios = relative_grad_norms(params, gradient)
        sums = jax.tree_util.tree_map_with_path(add, state.sums, ratios)
        largest = jnp.max(jnp.stack(jax.tree.leaves(sums)))
        divisor = jnp.where(largest > 0, largest, 1.0)
        is_first = position == measured_batches
        fresh = optimizer.init(params)
        inner = jax.tree.map(lambda x, y: jnp.where(is_first, x, y), fresh, state.inner)
        moves, moved_inner = optimizer.update(gradient, inner, params)
        moves = jax.tree.map(lambda move, s: jnp.where(measures, 0.0, s / divisor) * move, moves, sums)
        inner = jax.tree.map(lambda x, y: jnp.where(measures, x, y), inner, moved_inner)
        return moves, RelativeState(state.step + 1, sums, inner)

    return optax.GradientTransformation(init, update)


def auto_rgn(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    epoch_steps: int,
    measured_batches: int = 5,
    pretrained_network: Network | None = None,
    batch_norm: BatchNormMode = "train",
) -> Method:
    """`fine_tune.fine_tune` with the optimizer of `by_relative_gradient`."""
    optimizer = by_relative_gradient(optimizer, epoch_steps=epoch_steps, measured_batches=measured_batches)
    return in_phases(
        network, (Phase(optimizer, batch_norm=batch_norm),), pretrained_network=pretrained_network
    )
