"""Accuracy and likelihood, per example and per group. The caller reduces what is per example."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxlab.core import Batch, Evaluator, Outputs, State
from jaxlab.metrics.calibration import expected_calibration_error
from jaxlab.metrics.outputs import Dataset, Transform, collect_outputs


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the (first) largest logit is the label's; [..., K], [...] -> [...] bool."""
    chex.assert_equal_shape_prefix([logits, labels], labels.ndim)
    return jnp.argmax(logits, axis=-1) == labels


def negative_log_likelihood(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of a softmax, in nats and at least in float32; [..., K], [...] -> [...]."""
    chex.assert_equal_shape_prefix([logits, labels], labels.ndim)
    logits = jnp.asarray(logits, jnp.promote_types(logits.dtype, jnp.float32))
    log_probabilities = jax.nn.log_softmax(logits)  # shifts first: exact where all logits are large
    return -jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]


def group_counts(
    labels: jax.Array,
    attributes: jax.Array,
    num_classes: int,
    num_attributes: int,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Number of examples of each class with each attribute.

    Args:
      labels: [B] integers; rows with a label or an attribute outside its range are not counted.
      attributes: [B] integers.
      num_classes: C.
      num_attributes: A.
      mask: [B] bool, the rows to count; all if not given.

    Returns:
      [C, A] int32.
    """
    chex.assert_equal_shape([labels, attributes] if mask is None else [labels, attributes, mask])
    counted = (attributes >= 0) & (attributes < num_attributes)
    counted = counted if mask is None else counted & mask
    cells = jax.ops.segment_sum(
        counted.astype(jnp.int32), labels * num_attributes + attributes, num_classes * num_attributes
    )
    return cells.reshape(num_classes, num_attributes)


def group_accuracy(
    predictions: jax.Array,
    labels: jax.Array,
    attributes: jax.Array,
    num_classes: int,
    num_attributes: int,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Accuracy of each class with each attribute, NaN where `group_counts` is zero.

    Args:
      predictions: [B] integers, the predicted classes.
      labels, attributes, num_classes, num_attributes, mask: as for `group_counts`.

    Returns:
      [C, A] float32.
    """
    chex.assert_equal_shape([predictions, labels])
    count = functools.partial(
        group_counts, labels, attributes, num_classes=num_classes, num_attributes=num_attributes
    )
    hit = predictions == labels
    return count(mask=hit if mask is None else hit & mask) / count(mask=mask)


def classification(
    dataset: Dataset,
    *,
    batch_size: int = 512,
    transforms: tuple[Transform, ...] = (),
    num_bins: int = 15,
) -> Evaluator:
    """Accuracy, likelihood and calibration on a labelled data set; by group, where groups are known.

    Args:
      dataset: columns with `label`; with `attribute` too, groups are classes crossed with attributes.
      batch_size: rows per forward pass.
      transforms: the deterministic transforms of evaluation.
      num_bins: bins of the expected calibration error.

    Returns:
      An evaluator of `accuracy`, `nll` and `ece`; with attributes also of `unbiased_accuracy` and
      `worst_group_accuracy`, the mean and the minimum over groups that are not empty, `empty_groups` (how
      many) and the curve `group_accuracy`, the matrix row by row (NaN in empty groups). The evaluator
      `groups` tells aligned from conflicting groups too, and draws them.
    """

    @jax.jit
    def measure(logits: jax.Array) -> dict[str, jax.Array]:
        labels = jnp.asarray(dataset["label"])
        hit = correct(logits, labels)
        confidence = jnp.max(jax.nn.softmax(logits.astype(jnp.float32)), axis=-1)
        metrics = {
            "accuracy": hit.mean(),
            "nll": negative_log_likelihood(logits, labels).mean(),
            "ece": expected_calibration_error(confidence, hit, num_bins=num_bins),
        }
        if "attribute" in dataset:
            accuracy = group_accuracy(
                jnp.argmax(logits, axis=-1),
                labels,
                jnp.asarray(dataset["attribute"]),
                num_classes=logits.shape[-1],
                num_attributes=int(dataset["attribute"].max()) + 1,
            )
            metrics |= {
                "unbiased_accuracy": jnp.nanmean(accuracy),
                "worst_group_accuracy": jnp.nanmin(accuracy),
                "empty_groups": jnp.isnan(accuracy).sum(),
                "group_accuracy": accuracy.ravel(),
            }
        return metrics

    def evaluate(predict: Callable[[State, Batch], Outputs], state: State) -> dict[str, Any]:
        outputs = collect_outputs(predict, state, dataset, batch_size=batch_size, transforms=transforms)
        metrics = jax.device_get(measure(outputs["logits"]))
        return {name: value if value.ndim else value.item() for name, value in metrics.items()}

    return Evaluator(evaluate)
