"""Training on prompts of fresh functions, so that the forward pass itself learns the next one.

Shivam Garg, Dimitris Tsipras, Percy Liang, Gregory Valiant. *What Can Transformers Learn In-Context? A Case
Study of Simple Function Classes*. NeurIPS 2022 (arXiv 2208.01066). Official code:
dtsip/in-context-learning.
"""

from collections.abc import Mapping
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import optax

from jaxlab.core import Batch, Method, Network, Variables
from jaxlab.core.updates import minimize
from jaxlab.methods.in_context.functions import logistic_loss, squared_error
from jaxlab.methods.in_context.prompts import prefix_loss

_LOSSES = {"squared_error": squared_error, "logistic_loss": logistic_loss}


def in_context_learning(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    loss: Literal["squared_error", "logistic_loss"] = "squared_error",
) -> Method:
    """Trains a network on the batches of `in_context_prompts` to predict every label from what is before it.

    The loss is the mean over prompts and over their first `n_points` points, the first of all included,
    which is predicted from nothing. Metrics: `loss`; `excess_loss`, the loss over that of least squares on
    noiseless linear functions, the official code's; and the curriculum's `n_dims` and `n_points`.

    Args:
      network: `in_context_model`, or any other from {"xs", "ys"} to causal `predictions` [B, K].
      optimizer: in the paper Adam at a constant 1e-4.
      loss: of a point: "squared_error", or "logistic_loss" for labels in {-1, 1}.
    """

    def of_prompts(
        variables: Variables, batch: Batch, key: chex.PRNGKey
    ) -> tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]:
        outputs, variables = network.apply(variables, _prompts(batch), train=True, key=key)
        n_points, n_dims = batch["n_points"], batch["n_dims"]
        value = prefix_loss(outputs["predictions"], batch["ys"], n_points, _LOSSES[loss])
        # Least squares is off by one unit of variance for each dimension that it has no example for.
        unseen = jnp.maximum(n_dims[:, None] - jnp.arange(batch["ys"].shape[1]), 0)
        least = jnp.mean(unseen, where=jnp.arange(unseen.shape[1]) < n_points[:, None])
        metrics = {
            "excess_loss": value / least,
            "n_dims": jnp.mean(n_dims, dtype=jnp.float32),
            "n_points": jnp.mean(n_points, dtype=jnp.float32),
        }
        return value, (variables, metrics)

    return minimize(network, optimizer, of_prompts, inputs=_prompts)


def _prompts(batch: Batch) -> Mapping[str, jax.Array]:
    return {"xs": batch["xs"], "ys": batch["ys"]}
