"""One optimizer step on a network's parameters, as most methods take it."""

from collections.abc import Callable

import chex
import jax
import optax

from jaxlab.core.contracts import Variables


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
    moves, opt_state = optimizer.update(gradient, opt_state, variables["params"])
    params = optax.apply_updates(variables["params"], moves)
    return {**updated, "params": params}, opt_state, {"loss": value, **metrics}
