"""L2-SP: fine-tuning that is drawn back to where it started.

Xuhong Li, Yves Grandvalet, Franck Davoine. *Explicit Inductive Bias for Transfer Learning with Convolutional
Networks*. ICML 2018 (arXiv 1802.01483). Code of its authors: holyseven/TransferLearningClassification.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jaxlab.core import Method, Network
from jaxlab.methods.transfer.phases import BatchNormMode, Phase, in_phases
from jaxlab.methods.transfer.trainable import HEAD


def l2_sp(
    params: chex.ArrayTree,
    anchor: chex.ArrayTree,
    mask: chex.ArrayTree,
    alpha: jax.Array | float,
    beta: jax.Array | float,
) -> jax.Array:
    """(α/2) Σ_existing ‖w - w⁰‖² + (β/2) Σ_new ‖w‖²; a scalar.

    The official code of LP-FT has Σ ‖w - w⁰‖² times 0.01 without the half: α = 0.02, β = 0.

    Args:
      params: w.
      anchor: w⁰, a tree like it; what is new in it is not used.
      mask: a tree of bools: True is existing, False new.
      alpha: α.
      beta: β.
    """

    def of_leaf(w: jax.Array, w0: jax.Array, existing: bool) -> jax.Array:
        drawn = alpha * jnp.sum(jnp.square(w - w0))
        return jnp.where(existing, drawn, beta * jnp.sum(jnp.square(w))) / 2

    return sum(jax.tree.leaves(jax.tree.map(of_leaf, params, anchor, mask)))


class AnchoredState(NamedTuple):
    """Where the parameters were, and the optimizer's own state."""

    anchor: chex.ArrayTree
    inner: optax.OptState


def anchored(
    optimizer: optax.GradientTransformation, *, alpha: float, beta: float, kernels_only: bool = True
) -> optax.GradientTransformation:
    """The optimizer with the gradient of `l2_sp` added, its anchor being the parameters of its `init`.

    Args:
      optimizer: what moves the parameters.
      alpha, beta: see `l2_sp`; the layer `head` is what is new.
      kernels_only: whether other parameters than kernels are left out of the sums.
    """

    def init(params: chex.ArrayTree) -> AnchoredState:
        return AnchoredState(params, optimizer.init(params))

    def update(
        gradient: chex.ArrayTree, state: AnchoredState, params: chex.ArrayTree
    ) -> tuple[chex.ArrayTree, AnchoredState]:
        def of_leaf(path: tuple, g: jax.Array, w: jax.Array, w0: jax.Array) -> jax.Array:
            names = [entry.key for entry in path]
            if kernels_only and names[-1] != "kernel":
                return g
            return g + jax.grad(l2_sp)(w, w0, names[0] != HEAD, alpha, beta)

        gradient = jax.tree_util.tree_map_with_path(of_leaf, gradient, params, state.anchor)
        moves, inner = optimizer.update(gradient, state.inner, params)
        return moves, AnchoredState(state.anchor, inner)

    return optax.GradientTransformation(init, update)


def fine_tune(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    alpha: float = 0.1,
    beta: float = 0.01,
    kernels_only: bool = True,
    pretrained_network: Network | None = None,
    batch_norm: BatchNormMode = "train",
) -> Method:
    """`fine_tune.fine_tune` with the penalty; the metric `loss` is the cross-entropy without it.

    Args:
      network, optimizer, pretrained_network, batch_norm: as there.
      alpha, beta, kernels_only: see `anchored`.
    """
    optimizer = anchored(optimizer, alpha=alpha, beta=beta, kernels_only=kernels_only)
    return in_phases(
        network, (Phase(optimizer, batch_norm=batch_norm),), pretrained_network=pretrained_network
    )
