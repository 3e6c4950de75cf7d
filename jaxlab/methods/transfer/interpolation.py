"""WiSE-FT: between the weights before and after fine-tuning.

Mitchell Wortsman, Gabriel Ilharco, Jong Wook Kim et al. *Robust Fine-Tuning of Zero-Shot Models*. CVPR 2022
(arXiv 2109.01903). Official code: mlfoundations/wise-ft. Where a zero-shot head is missing, the head of LP
stands for it.
"""

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.core import Batch, Method, Network, TrainedNetwork, UserError, Variables
from jaxlab.data.transforms import Transform
from jaxlab.methods.transfer.phases import unchanging
from jaxlab.metrics.classification import negative_log_likelihood


def interpolate(
    theta0: chex.ArrayTree,
    theta1: chex.ArrayTree,
    alpha: jax.Array | float,
    fishers: tuple[chex.ArrayTree, chex.ArrayTree] | None = None,
    floor: float = 1e-8,
) -> chex.ArrayTree:
    """(1 - α) θ₀ + α θ₁, each parameter weighted by its Fisher information if that is given.

    (c₀θ₀ + c₁θ₁) / (c₀ + c₁) with c₀ = (1 - α) max(F₀, floor) and c₁ = α max(F₁, floor).

    Args:
      theta0: before fine-tuning; all variables, batch statistics too.
      theta1: after it, a tree like it.
      alpha: α in [0, 1].
      fishers: F₀ and F₁, of some or all of the parameters, by the same names; F is 1 of the others.
      floor: the least F.

    Raises:
      UserError: the trees differ in names or shapes.
    """
    shapes = [
        {jax.tree_util.keystr(path): jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (theta0, theta1)
    ]
    if shapes[0] != shapes[1]:
        differing = sorted({name for name, _ in set(shapes[0].items()) ^ set(shapes[1].items())})
        raise UserError(f"interpolate: the two networks differ in {differing[0]}.")
    information = [dict(jax.tree_util.tree_leaves_with_path(fisher)) for fisher in fishers or ({}, {})]

    def of_leaf(path: tuple, x0: jax.Array, x1: jax.Array) -> jax.Array:
        if path not in information[0] or path not in information[1]:
            return (1 - alpha) * x0 + alpha * x1
        c0 = (1 - alpha) * jnp.maximum(information[0][path], floor)
        c1 = alpha * jnp.maximum(information[1][path], floor)
        return (c0 * x0 + c1 * x1) / (c0 + c1)

    return jax.tree_util.tree_map_with_path(of_leaf, theta0, theta1)


def diagonal_fisher(
    network: Network,
    variables: Variables,
    dataset: Mapping[str, np.ndarray],
    *,
    batch_size: int = 50,
    transforms: tuple[Transform, ...] = (),
) -> chex.ArrayTree:
    """The mean over examples of (∂ log p(y | x) / ∂θ)², y being the labels (the empirical Fisher).

    It can be traced, and vmapped over `variables`.

    Args:
      network: a classifier, in evaluation.
      variables: its variables.
      dataset: the columns `image` and `label`.
      batch_size: gradients at once; a rest of the examples that fills no batch is left out.
      transforms: the deterministic transforms of evaluation.

    Returns:
      A tree like `variables["params"]`.
    """
    columns = {name: jnp.asarray(dataset[name]) for name in ("image", "label")}
    batch_size = min(batch_size, len(columns["label"]))
    num_batches = len(columns["label"]) // batch_size

    def gradient(image: jax.Array, label: jax.Array) -> chex.ArrayTree:
        def loss(params: chex.ArrayTree) -> jax.Array:
            outputs, _ = network.apply({**variables, "params": params}, image[None], train=False)
            return negative_log_likelihood(outputs["logits"], label[None])[0]

        return jax.grad(loss)(variables["params"])

    def add(total: chex.ArrayTree, batch: Batch) -> tuple[chex.ArrayTree, None]:
        for transform in transforms:
            batch = transform(batch, None)
        gradients = jax.vmap(gradient)(batch["image"], batch["label"])
        return jax.tree.map(lambda t, g: t + jnp.sum(jnp.square(g), axis=0), total, gradients), None

    batches = jax.tree.map(
        lambda x: x[: num_batches * batch_size].reshape(num_batches, batch_size, *x.shape[1:]), columns
    )
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, variables["params"]), batches)
    return jax.tree.map(lambda t: t / (num_batches * batch_size), total)


def wise_ft(
    network: Network,
    tuned_network: TrainedNetwork,
    *,
    alpha: float = 0.5,
    fisher_dataset: Mapping[str, np.ndarray] | None = None,
    transforms: tuple[Transform, ...] = (),
) -> Method:
    """The network between two trained ones. One update is all, and only measures (config.steps=1).

    Args:
      network: θ₀, with a head: in a config init_from=dict(network="lp", tuned_network="ft").
      tuned_network: θ₁.
      alpha: α.
      fisher_dataset: columns that the Fisher information of both is measured on; None: none is used.
      transforms: the deterministic transforms of evaluation.

    Raises:
      UserError: α out of range.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha: expected 0 to 1, got {alpha}.")

    def variables_of(key: chex.PRNGKey, batch: Batch) -> tuple[Variables, Variables]:
        theta0, theta1 = (n.init(key, batch["image"]) for n in (network, tuned_network))
        fishers = None
        if fisher_dataset is not None:
            fishers = tuple(
                {"params": diagonal_fisher(network, theta, fisher_dataset, transforms=transforms)}
                for theta in (theta0, theta1)
            )
        return interpolate(theta0, theta1, alpha, fishers), theta0

    return unchanging(network, variables_of)
