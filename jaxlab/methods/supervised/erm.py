"""Empirical risk minimisation: the mean cross-entropy over the batch, the baseline of everything here.

Vapnik, *Principles of Risk Minimization for Learning Theory*, NeurIPS 1991.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jaxlab.core import Batch, Method, Network, Outputs, Variables
from jaxlab.core.updates import gradient_update
from jaxlab.metrics.classification import correct, negative_log_likelihood


class ErmState(NamedTuple):
    """Variables of the network and the optimizer's state."""

    variables: Variables
    opt_state: optax.OptState


def erm(network: Network, optimizer: optax.GradientTransformation) -> Method:
    """Trains a classifier on batches {"image": [B, ...], "label": [B]}.

    Metrics: `loss` (mean cross-entropy, nats) and `accuracy` on the training batch.
    """

    def init(key: chex.PRNGKey, batch: Batch) -> ErmState:
        variables = network.init(key, batch["image"])
        return ErmState(variables, optimizer.init(variables["params"]))

    def update(state: ErmState, batch: Batch, key: chex.PRNGKey) -> tuple[ErmState, dict[str, jax.Array]]:
        def loss(variables: Variables) -> tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]:
            outputs, variables = network.apply(variables, batch["image"], train=True, key=key)
            logits = outputs["logits"]
            value = jnp.mean(negative_log_likelihood(logits, batch["label"]))
            return value, (variables, {"accuracy": jnp.mean(correct(logits, batch["label"]))})

        variables, opt_state, metrics = gradient_update(loss, optimizer, *state)
        return ErmState(variables, opt_state), metrics

    def predict(state: ErmState, batch: Batch) -> Outputs:
        return network.apply(state.variables, batch["image"], train=False)[0]

    return Method(init, update, predict)
