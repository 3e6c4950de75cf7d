"""One optimizer step on a network's parameters, as most methods take it; methods that are nothing else."""

import operator
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import optax

from jaxlab.core.contracts import Batch, Method, Network, Outputs, Variables


def apply_gradient(
    optimizer: optax.GradientTransformation,
    gradient: chex.ArrayTree,
    variables: Variables,
    opt_state: optax.OptState,
) -> tuple[Variables, optax.OptState]:
    """Moves `variables["params"]` as the optimizer makes it of their gradient."""
    moves, opt_state = optimizer.update(gradient, opt_state, variables["params"])
    return {**variables, "params": optax.apply_updates(variables["params"], moves)}, opt_state


def gradient_update(
    loss: Callable[[Variables], tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]],
    optimizer: optax.GradientTransformation,
    variables: Variables,
    opt_state: optax.OptState,
) -> tuple[Variables, optax.OptState, dict[str, jax.Array]]:
    """Moves `variables["params"]` against the gradient of a loss.

    Args:
      loss: `loss(variables) -> (scalar, (variables, metrics))`; the returned variables carry updated
        batch statistics.
      optimizer: what turns the gradient into a move.
      variables: before the step.
      opt_state: the optimizer's state.

    Returns:
      Variables, optimizer state and metrics; the loss is among them as "loss".
    """

    def of_params(params: chex.ArrayTree) -> tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]:
        return loss({**variables, "params": params})

    (value, (updated, metrics)), gradient = jax.value_and_grad(of_params, has_aux=True)(variables["params"])
    updated = {**updated, "params": variables["params"]}
    return *apply_gradient(optimizer, gradient, updated, opt_state), {"loss": value, **metrics}


class TrainState(NamedTuple):
    """Variables of a network and the optimizer's state."""

    variables: Variables
    opt_state: optax.OptState


def minimize(
    network: Network,
    optimizer: optax.GradientTransformation,
    loss: Callable[
        [Variables, Batch, chex.PRNGKey], tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]
    ],
    inputs: Callable[[Batch], chex.ArrayTree] = operator.itemgetter("image"),
) -> Method:
    """The method that minimises a loss of one network, and predicts with it.

    Args:
      network: its `init` gives the variables to start from.
      optimizer: what turns the gradient into a move.
      loss: `loss(variables, batch, key) -> (scalar, (variables, metrics))`; the returned variables carry
        updated batch statistics. The scalar becomes the metric "loss".
      inputs: `inputs(batch)` is what the network is initialised with and predicts from.
    """

    def init(key: chex.PRNGKey, batch: Batch) -> TrainState:
        variables = network.init(key, inputs(batch))
        return TrainState(variables, optimizer.init(variables["params"]))

    def update(state: TrainState, batch: Batch, key: chex.PRNGKey) -> tuple[TrainState, dict[str, jax.Array]]:
        def of_variables(variables: Variables) -> tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]:
            return loss(variables, batch, key)

        variables, opt_state, metrics = gradient_update(of_variables, optimizer, *state)
        return TrainState(variables, opt_state), metrics

    def predict(state: TrainState, batch: Batch) -> Outputs:
        return network.apply(state.variables, inputs(batch), train=False)[0]

    return Method(init, update, predict)
