"""Measures how well scores of a classifier's logits tell out-of-distribution examples, and draws it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxlab.core import Batch, Evaluator, Outputs, State, UserError
from jaxlab.core.errors import nearest
from jaxlab.methods.ood_detection.energy import energy, max_logit, maximum_softmax_probability
from jaxlab.metrics.detection import Positive, Rule, evaluate_draws, ood_metrics, roc_curve
from jaxlab.metrics.outputs import Dataset, Transform, collect_outputs

LogitScore = Callable[[jax.Array], jax.Array]  # logits [N, K] -> scores [N], larger = more OOD
Results = Mapping[str, Mapping[str, Any]]

_LOGIT_SCORES = {score.__name__: score for score in (energy, maximum_softmax_probability, max_logit)}
_BINS = 50
_FALSE_POSITIVE_RATES = np.linspace(0, 1, 101)  # where ROC curves are reported
_ID_COLOUR, _OOD_COLOUR = "#7f7f7f", "#d55e00"
_SCORE_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000")  # Okabe-Ito


def detection(
    dataset: Dataset,
    ood: Mapping[str, Dataset],
    *,
    scores: tuple[str | LogitScore, ...] = ("maximum_softmax_probability", "max_logit", "energy"),
    batch_size: int = 512,
    transforms: tuple[Transform, ...] = (),
    positive: Positive = "id",
    rule: Rule = "nearest",
    n_ood: int | None = None,
    draws: int = 10,
) -> Evaluator:
    """Out-of-distribution detection by scores that share one forward pass per data set.

    Args:
      dataset: in-distribution columns.
      ood: name -> columns of each out-of-distribution data set.
      scores: functions of logits [N, K], larger for OOD examples, known by their `__name__`; a string is
        a score of `ood_detection.energy`.
      batch_size: rows per forward pass.
      transforms: the deterministic transforms of evaluation, for every data set.
      positive: the positive class of FPR95 and AUPR; see `ood_metrics`.
      rule: the threshold of FPR95; see `fpr_at_recall`.
      n_ood: if given, metrics are means over `draws` random draws of so many examples of each OOD set, the
        same draws at every evaluation. The paper: 10 draws of a fifth of the in-distribution set's size,
        on which its AUPR depends. If not given, every example counts once.
      draws: number of draws.

    Returns:
      An evaluator of, for each score and OOD set, `<score>/<set>/fpr95`, `auroc` and `aupr`,
      in [0, 1], and their means over sets, `<score>/mean/...`. Its plots are drawn from the curves
      `histogram/<score>/edges`, `histogram/<score>/id` and `histogram/<score>/<set>`, fractions of the
      examples in each bin, and `roc/<score>/<set>`, true positive rates at 101 false positive rates
      evenly spaced from 0 to 1.

    Raises:
      UserError: an unknown or repeated score, no OOD set, or one called "id", "edges" or "mean".
    """
    functions = [_logit_score(score) for score in scores]
    by_name = {function.__name__: jax.jit(function) for function in functions}
    if len(by_name) < len(functions):
        raise UserError(f"scores: one name comes twice: {', '.join(f.__name__ for f in functions)}.")
    if not ood or not {"id", "edges", "mean"}.isdisjoint(ood):
        raise UserError("ood: expected data sets by name, at least one, none called 'id', 'edges' or 'mean'.")

    def measure(index: int, id_scores: np.ndarray, ood_scores: np.ndarray) -> dict[str, float]:
        if n_ood is None:
            return ood_metrics(id_scores, ood_scores, positive=positive, rule=rule)
        key = jax.random.fold_in(jax.random.key(0), index)
        drawn = evaluate_draws(
            key, id_scores, ood_scores, n_ood=n_ood, repeats=draws, positive=positive, rule=rule
        )
        return {name: value for name, value in drawn.items() if not name.endswith("_std")}

    def evaluate(predict: Callable[[State, Batch], Outputs], state: State) -> dict[str, Any]:
        logits = {}
        for name, columns in {"id": dataset, **ood}.items():
            outputs = collect_outputs(predict, state, columns, batch_size=batch_size, transforms=transforms)
            logits[name] = outputs["logits"]
        metrics: dict[str, Any] = {}
        for score, function in by_name.items():
            values = {name: np.asarray(function(x), np.float64) for name, x in logits.items()}
            measured = {name: measure(i, values["id"], values[name]) for i, name in enumerate(ood)}
            measured["mean"] = {
                metric: float(np.mean([measured[name][metric] for name in ood]))
                for metric in ("fpr95", "auroc", "aupr")
            }
            for name, row in measured.items():
                metrics |= {f"{score}/{name}/{metric}": value for metric, value in row.items()}
            metrics |= {f"histogram/{score}/{name}": curve for name, curve in _histograms(values).items()}
            metrics |= {f"roc/{score}/{name}": _roc(values["id"], values[name], positive) for name in ood}
        return metrics

    return Evaluator(evaluate, plot)


def _logit_score(score: str | LogitScore) -> LogitScore:
    if callable(score):
        return score
    if score not in _LOGIT_SCORES:
        raise UserError(
            f"scores: no '{score}'.{nearest(score, _LOGIT_SCORES)} Known: {', '.join(_LOGIT_SCORES)}."
        )
    return _LOGIT_SCORES[score]


def _histograms(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fractions of each set's scores in bins they share; the outer bins take what lies beyond."""
    pooled = np.concatenate(list(scores.values()))
    finite = pooled[np.isfinite(pooled)]
    low, high = np.percentile(finite, [0.5, 99.5]) if finite.size else (0.0, 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BINS + 1)
    fractions = {
        name: np.histogram(np.clip(values, low, high), edges)[0] / values.size
        for name, values in scores.items()
    }
    return {"edges": edges, **fractions}


def _roc(id_scores: np.ndarray, ood_scores: np.ndarray, positive: Positive) -> np.ndarray:
    fpr, tpr = roc_curve(-id_scores, -ood_scores) if positive == "id" else roc_curve(ood_scores, id_scores)
    return np.interp(_FALSE_POSITIVE_RATES, fpr, tpr)


def plot(results: Results) -> dict[str, Figure]:
    """Draws the curves of `detection`: a figure of histograms per score, and one of ROC curves.

    Args:
      results: metric -> `mean`, `stderr` and `values` over seeds.

    Returns:
      `histogram_<score>`, a panel per OOD set, averaged over seeds; and `roc`, a panel per OOD set with a
      curve per score, in a band of one standard error over seeds.
    """
    pairs = [name.split("/", 2)[1:] for name in results if name.startswith("roc/")]
    scores, sets = (list(dict.fromkeys(names)) for names in zip(*pairs))
    figures = {f"histogram_{score}": _plot_histograms(results, score, sets) for score in scores}
    return figures | {"roc": _plot_roc(results, scores, sets)}


def _plot_histograms(results: Results, score: str, sets: list[str]) -> Figure:
    seed_edges = np.asarray(results[f"histogram/{score}/edges"]["values"])
    edges = np.linspace(seed_edges.min(), seed_edges.max(), _BINS + 1)

    def average(name: str) -> np.ndarray:
        """Each seed has its own edges: interpolates their cumulative histograms at common ones."""
        seeds = zip(seed_edges, results[f"histogram/{score}/{name}"]["values"])
        cumulative = [np.interp(edges, own, np.append(0, np.cumsum(fractions))) for own, fractions in seeds]
        return np.diff(np.mean(cumulative, axis=0))

    figure, panels = _panels(len(sets))
    for axes, name in zip(panels, sets):
        for fractions, colour, label in (
            (average("id"), _ID_COLOUR, "in distribution"),
            (average(name), _OOD_COLOUR, "out of distribution"),
        ):
            axes.stairs(fractions, edges, fill=True, color=colour, alpha=0.35, label=label)
            axes.stairs(fractions, edges, color=colour, linewidth=1.2)
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_title(f"FPR95 {_spell(results[f'{score}/{name}/fpr95'])}", loc="right", fontsize=8)
    panels[0].set_ylim(bottom=0)  # shared; only now, for it ends the automatic scaling
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9, frameon=False
    )
    figure.supxlabel(f"{score.replace('_', ' ')} score (larger = more OOD)", fontsize=9)
    figure.supylabel("fraction of examples", fontsize=9)
    return figure


def _plot_roc(results: Results, scores: list[str], sets: list[str]) -> Figure:
    figure, panels = _panels(len(sets))
    for axes, name in zip(panels, sets):
        axes.plot([0, 1], [0, 1], color=_ID_COLOUR, linewidth=0.8, linestyle=":")
        for i, score in enumerate(scores):
            curve = results[f"roc/{score}/{name}"]
            mean, stderr = np.asarray(curve["mean"]), np.asarray(curve["stderr"])
            colour = _SCORE_COLOURS[i % len(_SCORE_COLOURS)]
            label = _spell(results[f"{score}/{name}/auroc"])
            axes.plot(_FALSE_POSITIVE_RATES, mean, color=colour, linewidth=1.5, label=label)
            low, high = np.clip([mean - stderr, mean + stderr], 0, 1)
            axes.fill_between(_FALSE_POSITIVE_RATES, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set_title(name, loc="left", fontsize=10)
        axes.legend(title="AUROC", fontsize=7, title_fontsize=7, loc="lower right", frameon=False)
        axes.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
    lines = panels[0].get_legend_handles_labels()[0]
    names = [score.replace("_", " ") for score in scores]
    figure.legend(lines, names, loc="outside upper center", ncols=len(names), fontsize=9, frameon=False)
    figure.supxlabel("false positive rate", fontsize=9)
    figure.supylabel("true positive rate", fontsize=9)
    return figure


def _panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    rows = math.ceil(count / 3)
    columns = math.ceil(count / rows)
    figure = Figure(figsize=(0.6 + 3 * columns, 0.6 + 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes in panels:
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, length=0)
    for axes in panels[count - columns : count]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _spell(result: Mapping[str, Any]) -> str:
    spread = f" ± {result['stderr']:.3f}" if len(result["values"]) > 1 else ""
    return f"{result['mean']:.3f}{spread}"
