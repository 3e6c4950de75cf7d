"""Margins for the energy-bounded loss, measured on a trained classifier (Liu et al., NeurIPS 2020)."""

import math
from collections.abc import Callable

import jax.numpy as jnp

from jaxlab.core import Batch, Evaluator, Outputs, State, UserError
from jaxlab.methods.ood_detection.energy import energy, propose_margins
from jaxlab.metrics.outputs import Dataset, Transform, collect_outputs


def margins(
    dataset: Dataset,
    auxiliary: Dataset,
    *,
    slack: float = 2.0,
    batch_size: int = 512,
    transforms: tuple[Transform, ...] = (),
) -> Evaluator:
    """Mean energies of in-distribution and auxiliary examples, and the margins that they propose.

    Args:
      dataset: in-distribution columns, such as the training set.
      auxiliary: columns of the outliers that fine-tuning will have.
      slack: how far outside the means the margins lie; see `propose_margins`.
      batch_size: rows per forward pass.
      transforms: the deterministic transforms of evaluation.

    Returns:
      An evaluator of `energy_in` and `energy_out`, the means, and `margin_in` and `margin_out`, which have no
      value (NaN) where `propose_margins` refuses them: the classifier does not tell the two sets apart.
    """

    def evaluate(predict: Callable[[State, Batch], Outputs], state: State) -> dict[str, float]:
        means = []
        for columns in (dataset, auxiliary):
            outputs = collect_outputs(predict, state, columns, batch_size=batch_size, transforms=transforms)
            means.append(float(jnp.mean(energy(jnp.asarray(outputs["logits"])))))
        try:
            margin_in, margin_out = propose_margins(*means, slack)
        except UserError:
            margin_in = margin_out = math.nan
        return {
            "energy_in": means[0],
            "energy_out": means[1],
            "margin_in": margin_in,
            "margin_out": margin_out,
        }

    return Evaluator(evaluate)
