"""Reweighting: every group of the training set counts the same, however few its examples are.

Shiori Sagawa, Aditi Raghunathan, Pang Wei Koh, Percy Liang. *An Investigation of Why Overparameterization
Exacerbates Spurious Correlations*. ICML 2020 (arXiv 2005.04345). Groups are classes crossed with a bias
attribute, which this method is told for each training example: an oracle beside methods that are not. As
the paper shows, a network large enough to memorise the minority can undo the weights.

The paper's weight of an example is 1 / p_g, p_g being the share of its group; here that is divided by the
number of groups, so that weights have mean 1 over the training set and a learning rate means what it does
without them.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.core import Batch, Method, Network, Outputs, UserError, Variables
from jaxlab.core.errors import nearest
from jaxlab.core.updates import gradient_update
from jaxlab.metrics.classification import correct, group_counts, negative_log_likelihood


def group_weights(
    labels: jax.Array, attributes: jax.Array, num_classes: int, num_attributes: int
) -> jax.Array:
    """N / (G n_g), where n_g is the size of an example's group and G the number of groups that have any.

    Args:
      labels: [N] integers in 0..C - 1.
      attributes: [N] integers in 0..A - 1.
      num_classes: C.
      num_attributes: A.

    Returns:
      [N] float32 of mean 1; their sum is N / G in each group.
    """
    counts = group_counts(labels, attributes, num_classes, num_attributes)
    return len(labels) / jnp.sum(counts > 0) / counts[labels, attributes]


def weighted_cross_entropy(logits: jax.Array, labels: jax.Array, weight: jax.Array) -> jax.Array:
    """Mean of `weight` times the cross-entropy, in nats; [B, C], [B], [B] -> scalar.

    It is divided by B and not by the sum of the weights: where the training set's have mean 1, a batch's
    gradient is an unbiased estimate of the weighted training loss's.
    """
    chex.assert_equal_shape([labels, weight])
    return jnp.mean(weight * negative_log_likelihood(logits, labels))


class WeightedState(NamedTuple):
    """Variables of the network, the optimizer's state, and the weight of each training example, [N]."""

    variables: Variables
    opt_state: optax.OptState
    weights: jax.Array


def weighted_erm(
    network: Network,
    optimizer: optax.GradientTransformation,
    initial_weights: Callable[[chex.PRNGKey, Batch], jax.Array],
) -> Method:
    """Trains a classifier on batches {"image": [B, ...], "label": [B], "index": [B]} of weighted examples.

    Args:
      network: the classifier.
      optimizer: its optimizer.
      initial_weights: `initial_weights(key, batch) -> [N]`, the weights of the training examples, which stay
        as they are; `batch` is what `init` is given, and `index` the positions of examples among them.

    Metrics: `loss` (weighted, nats), `accuracy` (unweighted) and `upweighted`, the share of examples with a
    weight above 1, all of the training batch. An `index` past the end makes the loss NaN.

    Raises:
      UserError: batches without `index`.
    """

    def init(key: chex.PRNGKey, batch: Batch) -> WeightedState:
        if "index" not in batch:
            raise UserError("reweighting: the batches have no 'index'; take a stream over a data set.")
        network_key, weights_key = jax.random.split(key)
        variables = network.init(network_key, batch["image"])
        weights = initial_weights(weights_key, batch)
        return WeightedState(variables, optimizer.init(variables["params"]), weights)

    def update(
        state: WeightedState, batch: Batch, key: chex.PRNGKey
    ) -> tuple[WeightedState, dict[str, jax.Array]]:
        weight = state.weights.at[batch["index"]].get(mode="fill", fill_value=jnp.nan)

        def loss(variables: Variables) -> tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]:
            outputs, variables = network.apply(variables, batch["image"], train=True, key=key)
            logits = outputs["logits"]
            metrics = {
                "accuracy": jnp.mean(correct(logits, batch["label"])),
                "upweighted": jnp.mean(weight > 1),
            }
            return weighted_cross_entropy(logits, batch["label"], weight), (variables, metrics)

        variables, opt_state, metrics = gradient_update(loss, optimizer, state.variables, state.opt_state)
        return WeightedState(variables, opt_state, state.weights), metrics

    def predict(state: WeightedState, batch: Batch) -> Outputs:
        return network.apply(state.variables, batch["image"], train=False)[0]

    return Method(init, update, predict)


def upweighting(
    network: Network, optimizer: optax.GradientTransformation, *, dataset: Mapping[str, np.ndarray]
) -> Method:
    """Trains a classifier on examples weighted by `group_weights`; batches and metrics of `weighted_erm`.

    Args:
      network: the classifier.
      optimizer: its optimizer.
      dataset: the columns that the batches are drawn from; only `label` and `attribute` are used.

    Raises:
      UserError: a column is missing, or negative somewhere; or batches without `index`.
    """
    groups = []
    for name in ("label", "attribute"):
        if name not in dataset:
            raise UserError(f"dataset: upweighting needs a column '{name}'.{nearest(name, dataset)}")
        groups.append(np.asarray(dataset[name], np.int32))
        if groups[-1].min() < 0:
            raise UserError(
                f"dataset: '{name}' is {groups[-1].min()} somewhere; upweighting needs it of all."
            )
    labels, attributes = groups
    weights = group_weights(labels, attributes, int(labels.max()) + 1, int(attributes.max()) + 1)
    return weighted_erm(network, optimizer, lambda key, batch: weights)
