"""Training on environments: what empirical risk minimisation and its penalised peers have in common.

A training batch holds n examples of each of E environments: {"image": [E, n, ...], "label": [E, n]}; logits
are [E, n, K] and features [E, n, F]. Sums and means here are over whole environments, so they stay those of
the global batch however devices share it. Prediction takes ordinary batches {"image": [B, ...]}.

Two losses: "softmax" of K logits and integer labels, and "sigmoid" of one logit and labels in {0, 1}.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.core import Batch, Method, Network, Outputs, Variables
from jaxlab.core.updates import gradient_update
from jaxlab.metrics.classification import correct, negative_log_likelihood
from jaxlab.metrics.reductions import masked_mean

Loss = Literal["softmax", "sigmoid"]
# `penalty(outputs, labels, risks) -> scalar`, of outputs [E, n, ...], labels [E, n] and risks [E].
Penalty = Callable[[Outputs, jax.Array, jax.Array], jax.Array]


def one_logit(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits [E, n, 1] or [E, n] and labels of the sigmoid loss as [E, n] each, of one floating dtype."""
    logits = logits.reshape(*logits.shape[:2])
    return logits, labels.reshape(logits.shape).astype(logits.dtype)


def example_losses(logits: jax.Array, labels: jax.Array, loss: Loss = "softmax") -> jax.Array:
    """Cross entropy of each example in nats; [E, n, K], [E, n] -> [E, n]."""
    if loss == "sigmoid":
        return optax.sigmoid_binary_cross_entropy(*one_logit(logits, labels))
    return negative_log_likelihood(logits, labels)


def environment_risks(
    logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None, loss: Loss = "softmax"
) -> jax.Array:
    """L_e, the mean cross entropy of each environment, in nats.

    Args:
      logits: [E, n, K]; of the sigmoid loss [E, n, 1] or [E, n].
      labels: [E, n].
      mask: [E, n] bool, the rows that are there; all if None. An environment without any has risk 0.
      loss: "softmax" or "sigmoid".

    Returns:
      [E].
    """
    losses = example_losses(logits, labels, loss)
    return losses.mean(1) if mask is None else jax.vmap(masked_mean)(losses, mask)


def penalty_weight(step: jax.Array | int, anneal_steps: int, weight: float, warm: float = 1.0) -> jax.Array:
    """`warm` in the first `anneal_steps` steps (from 0), `weight` afterwards; traceable."""
    return jnp.where(step < anneal_steps, warm, weight)


def pairwise_mean(penalty: Callable[[jax.Array, jax.Array], jax.Array], features: jax.Array) -> jax.Array:
    """The mean of a penalty on the features of two environments, over all pairs of them.

    Args:
      penalty: `penalty(x [n, F], y [n, F]) -> scalar`.
      features: [E, n, F].

    Returns:
      A scalar; 0 of a single environment.
    """
    first, second = np.triu_indices(len(features), k=1)
    if len(first) == 0:
        return jnp.zeros((), features.dtype)
    return jnp.mean(jax.vmap(penalty)(features[first], features[second]))


def squared_norm(params: chex.ArrayTree) -> jax.Array:
    """Σ‖w‖² over all parameters, biases too."""
    return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))


def merge(x: jax.Array) -> jax.Array:
    """[E, n, ...] -> [E · n, ...]."""
    return x.reshape(-1, *x.shape[2:])


def apply_to_environments(
    network: Network, variables: Variables, images: jax.Array, *, key: chex.PRNGKey, separately: bool = False
) -> tuple[Outputs, Variables]:
    """A training forward pass of all environments: outputs [E, n, ...], updated variables.

    Args:
      network: of images [B, ...].
      variables: its variables.
      images: [E, n, ...].
      key: drives dropout.
      separately: one pass an environment, in order, and not one of them all. They differ where batch
        normalisation takes its statistics from what passes together, and in dropout.
    """
    num_environments = len(images)
    if not separately:
        outputs, variables = network.apply(variables, merge(images), train=True, key=key)
        return jax.tree.map(lambda x: x.reshape(num_environments, -1, *x.shape[1:]), outputs), variables
    collected = []
    for environment, own_key in zip(images, jax.random.split(key, num_environments)):
        outputs, variables = network.apply(variables, environment, train=True, key=own_key)
        collected.append(outputs)
    return jax.tree.map(lambda *x: jnp.stack(x), *collected), variables


def class_logits(logits: jax.Array) -> jax.Array:
    """Logits [..., K] as they are, and one logit l [..., 1] as those of two classes, (0, l)."""
    if logits.shape[-1] > 1:
        return logits
    return jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)


def init_network(network: Network, key: chex.PRNGKey, batch: Batch) -> Variables:
    """Fresh variables, from a batch of environments."""
    return network.init(key, merge(batch["image"]))


def predict(network: Network, variables: Variables, batch: Batch) -> Outputs:
    """Outputs on an ordinary batch {"image": [B, ...]}; `logits` are those of at least two classes."""
    outputs, _ = network.apply(variables, batch["image"], train=False)
    return {**outputs, "logits": class_logits(outputs["logits"])}


def accuracy(outputs: Outputs, labels: jax.Array) -> jax.Array:
    """The share of correct predictions, of all environments together."""
    return jnp.mean(correct(class_logits(outputs["logits"]), labels))


class EnvironmentState(NamedTuple):
    """Variables of the network, the optimizer's state, and int32, the number of updates made."""

    variables: Variables
    opt_state: optax.OptState
    step: jax.Array


def minimize_penalized_risk(
    network: Network,
    optimizer: optax.GradientTransformation,
    penalty: Penalty,
    *,
    weight: float,
    anneal_steps: int = 0,
    reset_optimizer: bool = False,
    rescale: bool = False,
    l2: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    loss: Loss = "softmax",
    separately: bool = False,
) -> Method:
    """The method that minimises the risks of all environments and a penalty on them.

    loss = mean_e L_e + l2 Σ‖w‖² + p_t penalty, with p_t of `penalty_weight`. Metrics: `loss`; `risk`, mean_e
    L_e; `penalty`, without its weight; `accuracy`.

    Args:
      network: a classifier of images.
      optimizer: what turns the gradient into a move.
      penalty: `penalty(outputs, labels, risks) -> scalar`.
      weight: of the penalty, once it is annealed.
      anneal_steps: how many steps have the weight 1 first.
      reset_optimizer: whether the optimizer starts afresh at step `anneal_steps`, before it moves.
      rescale: whether the whole loss is divided by p_t where that is above 1.
      l2: of all parameters, in the loss.
      reduction: "sum" adds the risks up.
      loss: "softmax", or "sigmoid" for a network with one logit and labels in {0, 1}.
      separately: see `apply_to_environments`.
    """

    def init(key: chex.PRNGKey, batch: Batch) -> EnvironmentState:
        variables = init_network(network, key, batch)
        return EnvironmentState(variables, optimizer.init(variables["params"]), jnp.zeros((), jnp.int32))

    def update(
        state: EnvironmentState, batch: Batch, key: chex.PRNGKey
    ) -> tuple[EnvironmentState, dict[str, jax.Array]]:
        labels = batch["label"]
        p_t = penalty_weight(state.step, anneal_steps, weight)

        def objective(variables: Variables) -> tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]:
            params = variables["params"]
            outputs, variables = apply_to_environments(
                network, variables, batch["image"], key=key, separately=separately
            )
            risks = environment_risks(outputs["logits"], labels, loss=loss)
            of_risks = penalty(outputs, labels, risks)
            value = risks.sum() if reduction == "sum" else risks.mean()
            if l2:
                value += l2 * squared_norm(params)
            value += p_t * of_risks
            if rescale:
                value /= jnp.maximum(p_t, 1.0)
            metrics = {"risk": risks.mean(), "penalty": of_risks, "accuracy": accuracy(outputs, labels)}
            return value, (variables, metrics)

        opt_state = state.opt_state
        if reset_optimizer:
            fresh = optimizer.init(state.variables["params"])
            pick = functools.partial(jnp.where, state.step == anneal_steps)
            opt_state = jax.tree.map(pick, fresh, opt_state)
        variables, opt_state, metrics = gradient_update(objective, optimizer, state.variables, opt_state)
        return EnvironmentState(variables, opt_state, state.step + 1), metrics

    return Method(init, update, lambda state, batch: predict(network, state.variables, batch))
