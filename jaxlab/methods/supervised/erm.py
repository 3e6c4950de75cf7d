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
        def loss(variables: Variables):
            outputs, variables = network.apply(variables, batch["image"], train=True, key=key)
            logits = outputs["logits"]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            accuracy = jnp.mean(jnp.argmax(logits, -1) == batch["label"], dtype=jnp.float32)
            return jnp.mean(losses), (variables, {"accuracy": accuracy})

        variables, opt_state, metrics = gradient_update(loss, optimizer, *state)
        return ErmState(variables, opt_state), metrics

    def predict(state: ErmState, batch: Batch) -> Outputs:
        return network.apply(state.variables, batch["image"], train=False)[0]

    return Method(init, update, predict)
