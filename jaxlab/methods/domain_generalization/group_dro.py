"""Group DRO: minimises the risk of the worst group, by weights that follow the groups' risks.

Shiori Sagawa, Pang Wei Koh, Tatsunori Hashimoto, Percy Liang. *Distributionally Robust Neural Networks for
Group Shifts*. ICLR 2020 (arXiv 1911.08731), algorithm 1. Official code: kohpangwei/group_DRO. The groups are
the environments, as in DomainBed, or those that a batch names, as in the paper and in WILDS.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jaxlab.core import Batch, Method, Network, Variables
from jaxlab.core.updates import gradient_update
from jaxlab.methods.domain_generalization.environments import (
    Loss,
    accuracy,
    apply_to_environments,
    environment_risks,
    example_losses,
    init_network,
    merge,
    predict,
    squared_norm,
)


def group_dro_update(log_q: jax.Array, risks: jax.Array, step_size: float) -> tuple[jax.Array, jax.Array]:
    """Exponentiated gradient ascent on the groups' weights, q_g ∝ q_g exp(step_size · L_g).

    A group that a batch has no example of has L_g = 0; its weight then falls as q is normalised.

    Args:
      log_q: [G], the logarithm of the weights, in which exp(step_size · L_g) cannot overflow.
      risks: [G]; taken as constants.
      step_size: η; 0 leaves the weights as they are.

    Returns:
      The new log q [G], and the new weights q [G], which sum to 1.
    """
    chex.assert_equal_shape([log_q, risks])
    log_q = jax.nn.log_softmax(log_q + step_size * jax.lax.stop_gradient(risks))
    return log_q, jnp.exp(log_q)


def group_risks(losses: jax.Array, groups: jax.Array, num_groups: int) -> jax.Array:
    """The mean loss of each group, 0 where there is no example of it; [B], [B] in 0..G - 1 -> [G]."""
    sums = jax.ops.segment_sum(losses, groups, num_groups)
    counts = jax.ops.segment_sum(jnp.ones_like(losses), groups, num_groups)
    return sums / jnp.maximum(counts, 1)


class GroupDROState(NamedTuple):
    """Variables of the network, the optimizer's state, and log q [G]."""

    variables: Variables
    opt_state: optax.OptState
    log_q: jax.Array


def group_dro(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    step_size: float = 0.01,
    num_groups: int | None = None,
    loss: Loss = "softmax",
    l2: float = 0.0,
) -> Method:
    """Minimises Σ_g q_g L_g, with the weights q that this step's risks have moved already.

    Metrics: `loss`; `risk` and `worst_risk`, mean and maximum of L_g; `largest_weight`, of q; `accuracy`.

    Args:
      network: a classifier of images; each environment passes on its own, as in DomainBed.
      optimizer: what turns the gradient into a move.
      step_size: η of the weights.
      num_groups: G, where an example's group is its `context` in 0..G - 1 (attribute × label, say); None: the
        groups are the environments.
      loss: "softmax", or "sigmoid" for a network with one logit and labels in {0, 1}.
      l2: of all parameters, biases too, in the loss.
    """

    def init(key: chex.PRNGKey, batch: Batch) -> GroupDROState:
        variables = init_network(network, key, batch)
        groups = len(batch["label"]) if num_groups is None else num_groups
        log_q = jax.nn.log_softmax(jnp.zeros(groups))
        return GroupDROState(variables, optimizer.init(variables["params"]), log_q)

    def update(
        state: GroupDROState, batch: Batch, key: chex.PRNGKey
    ) -> tuple[GroupDROState, dict[str, jax.Array]]:
        labels = batch["label"]

        def objective(variables: Variables) -> tuple[jax.Array, tuple]:
            params = variables["params"]
            outputs, variables = apply_to_environments(
                network, variables, batch["image"], key=key, separately=True
            )
            if num_groups is None:
                risks = environment_risks(outputs["logits"], labels, loss=loss)
            else:
                losses = merge(example_losses(outputs["logits"], labels, loss))
                risks = group_risks(losses, merge(batch["context"]), num_groups)
            log_q, weights = group_dro_update(state.log_q, risks, step_size)
            value = jnp.sum(weights * risks)
            if l2:
                value += l2 * squared_norm(params)
            metrics = {
                "risk": risks.mean(),
                "worst_risk": risks.max(),
                "largest_weight": weights.max(),
                "accuracy": accuracy(outputs, labels),
            }
            return value, (variables, metrics | {"log_q": log_q})

        variables, opt_state, metrics = gradient_update(
            objective, optimizer, state.variables, state.opt_state
        )
        log_q = metrics.pop("log_q")
        return GroupDROState(variables, opt_state, log_q), metrics

    return Method(init, update, lambda state, batch: predict(network, state.variables, batch))
