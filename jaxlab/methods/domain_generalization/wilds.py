"""The metrics of WILDS: by group, the worst of them, a percentile over them, and macro F1.

P. W. Koh, S. Sagawa et al., *WILDS: A Benchmark of in-the-Wild Distribution Shifts*, ICML 2021
(arXiv 2012.07421); https://github.com/p-lambda/wilds. An example has a label and a row of metadata; the
columns that an evaluation groups by make its group. Headline metrics that these give: accuracy (Camelyon17,
RxRx1), macro F1 (iWildCam), worst-group accuracy (Waterbirds, CelebA), the 10th percentile of accuracy over
reviewers (Amazon).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.core import Batch, Evaluator, Outputs, State, UserError
from jaxlab.core.errors import nearest
from jaxlab.metrics.classification import correct
from jaxlab.metrics.outputs import Dataset, Transform, collect_outputs


def group_ids(
    metadata: jax.Array | Mapping[str, jax.Array],
    columns: Sequence[int] | Sequence[str],
    cardinalities: Sequence[int],
) -> jax.Array:
    """Numbers the combinations of values of some columns, as WILDS's `CombinatorialGrouper` does.

    Group Σ_j v_j · Π_{k<j} n_k: the first column varies fastest. WILDS takes the columns in the order of its
    metadata, however they were named; named in that order here, the groups have the numbers that they have
    there.

    Args:
      metadata: integers [N, M], or columns [N] by name.
      columns: the columns to combine, by index or by name.
      cardinalities: n_k, how many values each of them has: 0 … n_k - 1. WILDS counts them over all splits.

    Returns:
      [N] int32, below the product of the cardinalities; -1, no group, where a value is outside its range.

    Raises:
      UserError: another number of cardinalities than of columns, or more groups than int32 can number.
    """
    if len(columns) != len(cardinalities):
        raise UserError(f"cardinalities: {len(cardinalities)} for {len(columns)} columns; give one for each.")
    if math.prod(cardinalities) >= 2**31:
        raise UserError(f"cardinalities: {math.prod(cardinalities)} groups; combine fewer columns.")
    values = [metadata[name] if isinstance(metadata, Mapping) else metadata[:, name] for name in columns]
    size = len(next(iter(metadata.values()))) if isinstance(metadata, Mapping) else len(metadata)
    group, within, factor = jnp.zeros(size, jnp.int32), jnp.ones(size, bool), 1
    for value, cardinality in zip(values, cardinalities):
        group += factor * jnp.asarray(value, jnp.int32)
        within &= (value >= 0) & (value < cardinality)
        factor *= cardinality
    return jnp.where(within, group, -1)


def group_metrics(
    correct: jax.Array, group: jax.Array, num_groups: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Accuracy and size of each group, and the accuracy of the worst that has members.

    Args:
      correct: [N] bool, whether each prediction is the label.
      group: [N] integers; rows outside of 0 … G-1 are in no group.
      num_groups: G.

    Returns:
      Accuracies [G] float32, NaN where a group is empty; sizes [G] int32; the worst [], NaN where all are.
    """
    chex.assert_rank([correct, group], 1)
    chex.assert_equal_shape([correct, group])
    hits = jax.ops.segment_sum(correct.astype(jnp.int32), group, num_groups)
    count = jax.ops.segment_sum(jnp.ones(group.shape, jnp.int32), group, num_groups)
    accuracy = hits / count
    return accuracy, count, jnp.nanmin(accuracy)


def percentile_accuracy(
    correct: jax.Array, group: jax.Array, num_groups: int, percentile: float = 10
) -> jax.Array:
    """A percentile, in [0, 100], of the accuracies of the groups that have members, all of equal weight.

    Between two groups it is interpolated linearly, as by `numpy.percentile`.

    Args:
      correct, group, num_groups: as for `group_metrics`.
      percentile: which; WILDS takes the 10th over the reviewers of Amazon.

    Returns:
      [] float32; NaN where all groups are empty.
    """
    return jnp.nanpercentile(group_metrics(correct, group, num_groups)[0], percentile)


def macro_f1(predictions: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """The mean over the classes among the labels of F1 = 2·TP / (2·TP + FP + FN).

    Classes that no label has are left out; to predict one is a false negative of the label's class. WILDS
    calls scikit-learn's `f1_score` with `labels=unique(y_true)`.

    Args:
      predictions: [N] integers.
      labels: [N] integers in 0 … K-1.
      num_classes: K.

    Returns:
      [] float32; NaN where there are no labels.
    """
    chex.assert_rank([predictions, labels], 1)
    chex.assert_equal_shape([predictions, labels])

    ones = jnp.ones(labels.shape, jnp.int32)
    labelled = jax.ops.segment_sum(ones, labels, num_classes)
    predicted = jax.ops.segment_sum(ones, predictions, num_classes)
    true_positives = jax.ops.segment_sum((predictions == labels).astype(jnp.int32), labels, num_classes)
    f1 = 2 * true_positives / (labelled + predicted)
    return jnp.mean(f1, where=labelled > 0)


def wilds_evaluation(
    dataset: Dataset,
    *,
    group_by: tuple[str, ...],
    percentile: float = 10.0,
    batch_size: int = 512,
    transforms: tuple[Transform, ...] = (),
) -> Evaluator:
    """WILDS's metrics on a labelled data set with columns of metadata.

    Args:
      dataset: columns with `label` and those of `group_by`, integers from 0.
      group_by: the columns whose combinations are the groups; `label` may be one of them.
      percentile: of `percentile_accuracy`, in [0, 100].
      batch_size: rows per forward pass.
      transforms: the deterministic transforms of evaluation.

    Returns:
      An evaluator of `accuracy`, `macro_f1`, and over the groups that the data set has `percentile_accuracy`
      and `worst_group_accuracy`; and of the curve `group_accuracy`, of these groups in the order of
      `group_ids`.

    Raises:
      UserError: no such columns, values that are no integers from 0, or too many combinations.
    """
    for name in ("label", *group_by):
        if name not in dataset:
            raise UserError(f"dataset: it has no column '{name}'.{nearest(name, dataset)}")
        column = dataset[name]
        if column.ndim != 1 or column.dtype.kind not in "iu" or (column.size and column.min() < 0):
            raise UserError(f"dataset: column '{name}' holds more than integers from 0; group by another.")
    if not group_by:
        raise UserError("group_by: empty; name the columns of metadata that make the groups.")
    if not 0 <= percentile <= 100:
        raise UserError(f"percentile: expected 0 to 100, got {percentile}.")
    cardinalities = [int(dataset[name].max(initial=0)) + 1 for name in group_by]
    # Numbered anew, without the combinations that do not occur, which can be many more than the examples.
    present, group = np.unique(group_ids(dataset, group_by, cardinalities), return_inverse=True)

    @jax.jit
    def measure(logits: jax.Array) -> dict[str, jax.Array]:
        labels, of_group = jnp.asarray(dataset["label"]), jnp.asarray(group)
        hit = correct(logits, labels)
        accuracy, _, worst = group_metrics(hit, of_group, len(present))
        return {
            "accuracy": hit.mean(),
            "worst_group_accuracy": worst,
            "percentile_accuracy": percentile_accuracy(hit, of_group, len(present), percentile),
            "macro_f1": macro_f1(jnp.argmax(logits, axis=-1), labels, logits.shape[-1]),
            "group_accuracy": accuracy,
        }

    def evaluate(predict: Callable[[State, Batch], Outputs], state: State) -> dict[str, Any]:
        outputs = collect_outputs(predict, state, dataset, batch_size=batch_size, transforms=transforms)
        metrics = jax.device_get(measure(outputs["logits"]))
        return {name: value if value.ndim else value.item() for name, value in metrics.items()}

    return Evaluator(evaluate)
