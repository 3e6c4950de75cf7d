"""How well relative difficulty tells bias-conflicting examples, and what the biased network has learnt.

For every method whose state has the loss memories and the biased network of *Learning from Failure* (Nam et
al., NeurIPS 2020, arXiv 2007.02561). Attributes are used for scoring only.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxlab.core import Batch, Evaluator, Outputs, State, UserError
from jaxlab.methods.debiasing.lff import LossMemory, relative_difficulty
from jaxlab.metrics.detection import auroc, average_precision
from jaxlab.metrics.groups import aligned_attributes
from jaxlab.metrics.outputs import Dataset

_EDGES = np.linspace(0, 1, 21)  # of the histograms
_GROUPS = {"aligned": "#0072b2", "conflicting": "#d55e00"}


def difficulty(dataset: Dataset, *, aligned_attr: tuple[int, ...] | None = None) -> Evaluator:
    """Relative difficulty W as a detector of the bias-conflicting examples of the training set.

    Nothing is predicted: W is that of `relative_difficulty`, of the loss memories as they are, for all
    training examples. Those not seen yet have W = 0.

    Args:
      dataset: the training set, in the order that `index` counts; columns `label` and `attribute`.
      aligned_attr: the attribute that goes with each class; attribute c goes with class c if not given.

    Returns:
      An evaluator of `auroc` and `average_precision` of W for "conflicting", in [0, 1] and ties counted
      half in the former, and the means of W, `aligned_mean` and `conflicting_mean`; the same of the biased
      network's loss memory alone, `biased_loss/...`; `seen`, the fraction of examples that have been; and
      the curves `histogram/aligned` and `histogram/conflicting`, the fraction of each group in 20 equal
      bins of W over [0, 1]. What needs a group without examples is NaN. Its plot `histogram` shows both
      curves, averaged over seeds.

    Raises:
      UserError: the data set has no such columns, or a class has no aligned attribute; when evaluated: the
        state has no loss memories, or they are of another data set.
    """
    aligned = aligned_attributes(dataset, aligned_attr)
    num_classes, size = len(aligned), len(dataset["label"])
    conflicting = dataset["attribute"] != aligned[dataset["label"]]

    @jax.jit
    def weigh(memory: LossMemory, biased_memory: LossMemory) -> jax.Array:
        labels = jnp.asarray(dataset["label"], jnp.int32)
        return relative_difficulty(biased_memory, memory, jnp.arange(size), labels, labels, num_classes)

    def measure(scores: np.ndarray) -> dict[str, float]:
        pos, neg = scores[conflicting], scores[~conflicting]
        both = pos.size and neg.size
        return {
            "auroc": auroc(pos, neg) if both else np.nan,
            "average_precision": average_precision(pos, neg) if both else np.nan,
            "aligned_mean": neg.mean() if neg.size else np.nan,
            "conflicting_mean": pos.mean() if pos.size else np.nan,
        }

    def evaluate(predict: Callable[[State, Batch], Outputs], state: State) -> dict[str, Any]:
        memory, biased_memory = (
            _field(state, name, "debiasing.difficulty") for name in ("memory", "biased_memory")
        )
        if len(memory.value) != size:
            raise UserError(
                f"debiasing.difficulty: its dataset has {size} examples, the loss memories"
                f" {len(memory.value)}; give it the training set."
            )
        weight = np.asarray(weigh(memory, biased_memory), np.float64)
        biased_loss = measure(np.asarray(biased_memory.value, np.float64))
        return {
            **measure(weight),
            **{f"biased_loss/{name}": value for name, value in biased_loss.items()},
            "seen": float(np.mean(memory.seen)),
            "histogram/aligned": _fractions(weight[~conflicting]),
            "histogram/conflicting": _fractions(weight[conflicting]),
        }

    def plot(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
        sizes = {"aligned": np.sum(~conflicting), "conflicting": np.sum(conflicting)}
        return {"histogram": _plot_histogram(results, sizes)}

    return Evaluator(evaluate, plot)


def biased_network(evaluator: Evaluator) -> Evaluator:
    """An evaluator of the biased network: the given one, with `biased_variables` as the state's `variables`.

    With `groups` it tells how biased that network is: ideally it is always right on bias-aligned examples
    and never on conflicting ones.

    Args:
      evaluator: of any kind; its metrics and plots keep their names.

    Raises:
      UserError: when evaluated: the state has no `biased_variables`.
    """

    def evaluate(predict: Callable[[State, Batch], Outputs], state: State) -> dict[str, Any]:
        variables = _field(state, "biased_variables", "debiasing.difficulty.biased_network")
        return evaluator.evaluate(predict, state._replace(variables=variables))

    return evaluator._replace(evaluate=evaluate)


def _field(state: State, name: str, evaluator: str) -> Any:
    if not hasattr(state, name):
        raise UserError(
            f"{evaluator}: the method's state ({type(state).__name__}) has no '{name}'; leave the evaluator"
            " out, or take a method that has, such as debiasing.lff."
        )
    return getattr(state, name)


def _fractions(weight: np.ndarray) -> np.ndarray:
    counts = np.histogram(weight, _EDGES)[0]
    return counts / weight.size if weight.size else np.full(counts.shape, np.nan)


def _plot_histogram(results: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int]) -> Figure:
    figure = Figure(figsize=(4.8, 3.3), layout="constrained")
    axes = figure.add_subplot()
    for name, colour in _GROUPS.items():
        fractions = np.asarray(results[f"histogram/{name}"]["mean"])
        label = f"bias-{name} ({sizes[name]:,})"
        axes.stairs(fractions, _EDGES, fill=True, color=colour, alpha=0.35, label=label)
        axes.stairs(fractions, _EDGES, color=colour, linewidth=1.2)
    area = results["auroc"]
    spread = "" if np.isnan(area["stderr"]) else f" ± {area['stderr']:.3f}"
    axes.set_title(f"AUROC {area['mean']:.3f}{spread}", loc="right", fontsize=9)
    # Logarithmic, for the tails; linear below one in a thousand, for the empty bins.
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_xlabel("relative difficulty W", fontsize=9)
    axes.set_ylabel("fraction of the group", fontsize=9)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, length=0)
    figure.legend(loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    return figure
