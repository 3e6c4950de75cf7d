"""What adaptation did to a network: accuracy under shift, and how far its features moved."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike

from jaxlab.core import Batch, Evaluator, Outputs, State, UserError
from jaxlab.core.errors import nearest
from jaxlab.metrics.classification import correct
from jaxlab.metrics.outputs import Dataset, Transform, collect_outputs

PredictFn = Callable[[State, Batch], Outputs]
_ID_COLOUR, _OOD_COLOUR = "#0072b2", "#d55e00"


def feature_movement(f0: jax.Array, f1: jax.Array) -> jax.Array:
    """‖f₁ - f₀‖₂ of each example, [n, F], [n, F] -> [n]; its gradient is 0 where nothing moved."""
    chex.assert_equal_shape([f0, f1])
    squared = jnp.sum(jnp.square(f1 - f0), axis=-1)
    moved = squared > 0
    return jnp.where(moved, jnp.sqrt(jnp.where(moved, squared, 1.0)), 0.0)


def accuracy(logits: jax.Array, labels: jax.Array, valid_classes: ArrayLike | None = None) -> jax.Array:
    """The share of examples whose label has the (first) largest logit.

    Args:
      logits: [n, K].
      labels: [n] in 0..K - 1.
      valid_classes: the classes that can be predicted, such as the 200 of ImageNet-R; all if None.

    Returns:
      A float32 scalar.

    Raises:
      UserError: no valid class, or one that is not in 0..K - 1.
    """
    logits = jnp.asarray(logits)
    if valid_classes is not None:
        valid = np.asarray(valid_classes)
        if valid.size == 0 or valid.min() < 0 or valid.max() >= logits.shape[-1]:
            raise UserError(
                f"valid_classes: expected some of 0..{logits.shape[-1] - 1}, got {valid_classes}."
            )
        allowed = np.zeros(logits.shape[-1], bool)
        allowed[valid] = True
        logits = jnp.where(allowed, logits, -jnp.inf)
    return jnp.mean(correct(logits, jnp.asarray(labels)))


def select_on(table: Sequence[Mapping[str, Any]], metric: str, first_max: bool = True) -> Mapping[str, Any]:
    """The row with the largest value of a metric: of epochs, of learning rates (means over seeds), of C.

    Args:
      table: rows by name; NaN is never the largest.
      metric: of data in distribution, or the figures out of distribution say nothing.
      first_max: which of several largest is taken, the first or the last.

    Raises:
      UserError: no row, no row with a number, or a row without the metric.
    """
    for row in table:
        if metric not in row:
            raise UserError(f"select_on: a row has no '{metric}'.{nearest(metric, row)}")
    values = np.array([row[metric] for row in table], np.float64)
    if np.isnan(values).all():
        raise UserError(f"select_on: no row has a value of '{metric}'.")
    best = np.flatnonzero(values == np.nanmax(values))
    return table[best[0 if first_max else -1]]


def shifted_accuracy(
    dataset: Dataset,
    ood: Mapping[str, Dataset],
    *,
    validation: Dataset | None = None,
    batch_size: int = 512,
    transforms: tuple[Transform, ...] = (),
    valid_classes: Mapping[str, tuple[int, ...]] | None = None,
) -> Evaluator:
    """Accuracy in and out of distribution.

    Args:
      dataset: in-distribution columns of the test.
      ood: name -> columns of each shifted test set.
      validation: other in-distribution columns, for all that is chosen.
      batch_size: rows per forward pass.
      transforms: the deterministic transforms of evaluation.
      valid_classes: name of a shifted set -> the classes that can be predicted there, see `accuracy`.

    Returns:
      An evaluator of `id_accuracy`, `ood_accuracy`, the mean over the shifted sets, `validation_accuracy`,
      where there is validation, and `domains/<name>/accuracy`.

    Raises:
      UserError: no shifted set, or classes of one that is not there.
    """
    valid_classes = dict(valid_classes or {})
    _check_ood(ood)
    for name in valid_classes:
        if name not in ood:
            raise UserError(f"valid_classes: no shifted set '{name}'.{nearest(name, ood)}")

    def evaluate(predict: PredictFn, state: State) -> dict[str, Any]:
        def of(columns: Dataset, classes: tuple[int, ...] | None = None) -> float:
            outputs = collect_outputs(predict, state, columns, batch_size=batch_size, transforms=transforms)
            return float(accuracy(outputs["logits"], columns["label"], classes))

        by_set = {name: of(columns, valid_classes.get(name)) for name, columns in ood.items()}
        results = {"id_accuracy": of(dataset), "ood_accuracy": float(np.mean(list(by_set.values())))}
        if validation is not None:
            results["validation_accuracy"] = of(validation)
        return results | {f"domains/{name}/accuracy": value for name, value in by_set.items()}

    def plot(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
        shown = {"in distribution": results["id_accuracy"]}
        shown |= {name.replace("_", " "): results[f"domains/{name}/accuracy"] for name in ood}
        figure = Figure(figsize=(1.3 + 0.9 * len(shown), 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(
            list(shown),
            [result["mean"] for result in shown.values()],
            yerr=[np.nan_to_num(result["stderr"]) for result in shown.values()],
            color=[_ID_COLOUR] + [_OOD_COLOUR] * len(ood),
            capsize=3,
        )
        axes.set(ylim=(0, 1), ylabel="accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.tick_params(axis="x", labelrotation=30)
        axes.spines[["top", "right"]].set_visible(False)
        return {"domains": figure}

    return Evaluator(evaluate, plot)


def feature_distortion(
    dataset: Dataset,
    ood: Mapping[str, Dataset],
    *,
    batch_size: int = 512,
    transforms: tuple[Transform, ...] = (),
) -> Evaluator:
    """Δ, the mean `feature_movement` from the features that training started from (Kumar et al., 2022).

    Features are the network's, as they are, in evaluation.

    Args:
      dataset, ood, batch_size, transforms: as for `shifted_accuracy`; labels are not used.

    Returns:
      An evaluator of `id_movement`, `ood_movement`, the mean over the shifted sets, and
      `domains/<name>/movement`.

    Raises:
      UserError: no shifted set; of the evaluator: the method's state has no `initial` variables.
    """
    _check_ood(ood)

    def evaluate(predict: PredictFn, state: State) -> dict[str, Any]:
        if not hasattr(state, "initial"):
            raise UserError("feature_distortion: the method keeps no 'initial' variables to compare with.")

        def features(variables: chex.ArrayTree, columns: Dataset) -> np.ndarray:
            at = state._replace(variables=variables)
            options = dict(batch_size=batch_size, transforms=transforms, keys=("features",))
            return collect_outputs(predict, at, columns, **options)["features"]

        def of(columns: Dataset) -> float:
            before, after = (features(v, columns) for v in (state.initial, state.variables))
            return float(jnp.mean(feature_movement(jnp.asarray(before), jnp.asarray(after))))

        by_set = {name: of(columns) for name, columns in ood.items()}
        results = {"id_movement": of(dataset), "ood_movement": float(np.mean(list(by_set.values())))}
        return results | {f"domains/{name}/movement": value for name, value in by_set.items()}

    return Evaluator(evaluate)


def _check_ood(ood: Mapping[str, Dataset]) -> None:
    if not ood:
        raise UserError("ood: expected shifted data sets by name, at least one.")
