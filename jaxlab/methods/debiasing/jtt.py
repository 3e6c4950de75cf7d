"""Just Train Twice: what a first classifier gets wrong counts more in the training of a second.

Evan Zheran Liu, Behzad Haghgoo, Annie S. Chen, Aditi Raghunathan, Pang Wei Koh, Shiori Sagawa, Percy Liang,
Chelsea Finn. *Just Train Twice: Improving Group Robustness without Training Group Information*. ICML 2021
(arXiv 2107.09044). Official code: anniesch/jtt.

The first classifier is trained as usual but briefly, as a stage of its own with method `supervised.erm`.
No attribute label is used in training; the paper tunes on a validation set that has them.

The paper trains the second one on M = N + (λ - 1)|E| examples: λ copies of each in the error set E, one of
each other. Here all N are drawn once an epoch, with the weights λN / M and N / M. The mean over the N of a
weighted gradient is the mean over the M of the plain one, so batches of any size have the same expected
gradient. Three things differ: that gradient's variance; the length of an epoch, N and not M examples; and
batch statistics, which here are those of the unweighted data.

Where the paper and its code differ, this follows the paper:

- The code appends λ copies of E to the data set, which makes λ + 1.
- The code's E is what was predicted wrong during the last epoch of training the first classifier, each
  example by the network of that step, in training mode. Here it is what the final network gets wrong.
"""

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.core import Batch, Method, Network, TrainedNetwork, UserError, Variables
from jaxlab.data.transforms import Transform
from jaxlab.methods.debiasing.reweighting import weighted_erm
from jaxlab.metrics.classification import correct
from jaxlab.metrics.outputs import map_rows


def error_set(
    network: Network,
    variables: Variables,
    dataset: Mapping[str, np.ndarray],
    *,
    batch_size: int = 512,
    transforms: tuple[Transform, ...] = (),
) -> jax.Array:
    """Which examples a classifier gets wrong, Equation 4. It can be traced, and vmapped over `variables`.

    Args:
      network: the classifier.
      variables: its variables.
      dataset: columns of N rows; only `image` and `label` are used.
      batch_size: rows per forward pass, one after the other.
      transforms: applied in turn before the network, without a key.

    Returns:
      [N] bool.
    """

    def wrong(batch: Batch) -> jax.Array:
        outputs, _ = network.apply(variables, batch["image"], train=False)
        return ~correct(outputs["logits"], batch["label"])

    columns = {name: dataset[name] for name in ("image", "label")}
    return map_rows(wrong, columns, batch_size=batch_size, transforms=transforms)


def error_weights(wrong: jax.Array, upweight: float) -> jax.Array:
    """λN / M in the error set and N / M elsewhere, M = N + (λ - 1)|E|; [N] bool -> [N] float32 of mean 1.

    They stand in for `upweight`, λ, copies of each example of the error set, Equation 5.
    """
    # Exactly 1 where nothing is wrong.
    return jnp.where(wrong, upweight, 1.0) / (1 + (upweight - 1) * jnp.mean(wrong))


def jtt(
    network: Network,
    identification_network: TrainedNetwork,
    optimizer: optax.GradientTransformation,
    *,
    dataset: Mapping[str, np.ndarray],
    upweight: float,
    batch_size: int = 512,
    transforms: tuple[Transform, ...] = (),
) -> Method:
    """Trains the second classifier, Algorithm 1; batches and metrics are those of `weighted_erm`.

    The error set is found once, in `init`.

    Args:
      network: the second classifier, which starts afresh.
      identification_network: the first classifier, whose `init` returns its trained variables: in a config,
        `init_from=dict(identification_network="<stage>")`.
      optimizer: of the second classifier.
      dataset: the columns that the batches are drawn from; only `image` and `label` are used.
      upweight: λ, at least 1. The official commands append 100 copies for Waterbirds, 50 for CelebA, 4 for
        MultiNLI and 6 for CivilComments, of what was wrong in epochs 60, 1, 2 and 2, counted from 0.
      batch_size: rows per forward pass of the first classifier.
      transforms: the deterministic transforms of evaluation, from rows of `dataset` to network inputs.

    Raises:
      UserError: `upweight` or `batch_size` out of range, or batches without `index`.
    """
    if not 1 <= upweight < float("inf"):
        raise UserError(f"upweight: expected a number that is at least 1, got {upweight}.")
    if batch_size < 1:
        raise UserError(f"batch_size: expected at least 1, got {batch_size}.")

    def initial_weights(key: chex.PRNGKey, batch: Batch) -> jax.Array:
        variables = identification_network.init(key, batch["image"])
        wrong = error_set(
            identification_network, variables, dataset, batch_size=batch_size, transforms=transforms
        )
        return error_weights(wrong, upweight)

    return weighted_erm(network, optimizer, initial_weights)
