"""Empirical risk minimisation: the mean cross-entropy over the batch, the baseline of everything here.

Vapnik, *Principles of Risk Minimization for Learning Theory*, NeurIPS 1991.
"""

import chex
import jax
import jax.numpy as jnp
import optax

from jaxlab.core import Batch, Method, Network, Variables
from jaxlab.core.updates import minimize
from jaxlab.metrics.classification import correct, negative_log_likelihood


def erm(network: Network, optimizer: optax.GradientTransformation) -> Method:
    """Trains a classifier on batches {"image": [B, ...], "label": [B]}.

    Metrics: `loss` (mean cross-entropy, nats) and `accuracy` on the training batch.
    """

    def loss(
        variables: Variables, batch: Batch, key: chex.PRNGKey
    ) -> tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]:
        outputs, variables = network.apply(variables, batch["image"], train=True, key=key)
        logits = outputs["logits"]
        value = jnp.mean(negative_log_likelihood(logits, batch["label"]))
        return value, (variables, {"accuracy": jnp.mean(correct(logits, batch["label"]))})

    return minimize(network, optimizer, loss)
