"""Measures how well out-of-distribution scores tell examples apart, and draws it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxlab.core import Batch, Evaluator, Outputs, State, UserError
from jaxlab.core.errors import nearest
from jaxlab.methods.ood_detection import scores as known_scores
from jaxlab.methods.ood_detection.logit_scores import Head
from jaxlab.methods.ood_detection.scores import Score, Search
from jaxlab.metrics.detection import (
    Positive,
    Rule,
    evaluate_draws,
    ood_metrics,
    roc_curve,
    threshold_at_tpr,
)
from jaxlab.metrics.outputs import Dataset, Transform, collect_outputs

LogitScore = Callable[[jax.Array], jax.Array]  # logits [N, K] -> scores [N], larger = more OOD
Results = Mapping[str, Mapping[str, Any]]

_BINS = 50
_FALSE_POSITIVE_RATES = np.linspace(0, 1, 101)  # where ROC curves are reported
_ID_COLOUR, _OOD_COLOUR = "#7f7f7f", "#d55e00"
_SCORE_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000")  # Okabe-Ito
_MOST_DRAWN = len(_SCORE_COLOURS)  # scores that have curves; a heat map shows them all


def detection(
    dataset: Dataset,
    ood: Mapping[str, Dataset],
    *,
    scores: tuple[str | LogitScore | Score | Search, ...]
    | Mapping[str, str | LogitScore | Score | Search] = (
        "maximum_softmax_probability",
        "max_logit",
        "energy",
    ),
    train: Dataset | None = None,
    validation: Dataset | None = None,
    validation_ood: Mapping[str, Dataset] | None = None,
    batch_size: int = 512,
    transforms: tuple[Transform, ...] = (),
    positive: Positive = "id",
    rule: Rule = "nearest",
    n_ood: int | None = None,
    draws: int = 10,
    tpr: float = 0.95,
) -> Evaluator:
    """Out-of-distribution detection by scores that share one forward pass per data set.

    Args:
      dataset: in-distribution columns.
      ood: name -> columns of each out-of-distribution data set.
      scores: of `ood_detection.scores`, by name or as sections, or functions of logits [N, K] that are larger
        for OOD examples. In a list each goes by its own name; a mapping gives them others.
      train: in-distribution columns with `label`, which scores are fitted on, if any is.
      validation: held-out in-distribution columns, for scores that search their hyper-parameters.
      validation_ood: name -> columns of the outliers of that search, none of them those of the test.
      batch_size: rows per forward pass.
      transforms: the deterministic transforms of evaluation, for every data set.
      positive: the positive class of FPR95 and AUPR; see `ood_metrics`.
      rule: the threshold of FPR95; see `fpr_at_recall`.
      n_ood: if given, metrics are means over `draws` random draws of so many examples of each OOD set, the
        same draws at every evaluation. The paper: 10 draws of a fifth of the in-distribution set's size,
        on which its AUPR depends. If not given, every example counts once.
      draws: number of draws.
      tpr: the share of `dataset` that `threshold` keeps.

    Returns:
      An evaluator of, for each score and OOD set, `<score>/<set>/fpr95`, `auroc` and `aupr`,
      in [0, 1], and their means over sets, `<score>/mean/...`; and, of one entry, `threshold/<score>`, above
      which an example is to be taken for OOD, and `chosen/<score>`, the position of what a search chose among
      its candidates. Its plots are drawn from the curves of the first seven scores:
      `histogram/<score>/edges`, `histogram/<score>/id` and `histogram/<score>/<set>`, fractions of the
      examples in each bin, and `roc/<score>/<set>`, true positive rates at 101 false positive rates
      evenly spaced from 0 to 1.

    Raises:
      UserError: an unknown or repeated score, no OOD set, or one called "id", "edges" or "mean"; data are
        missing that a score is fitted on or searches with.
    """
    by_name = _by_name(scores)
    if not ood or not {"id", "edges", "mean"}.isdisjoint(ood):
        raise UserError("ood: expected data sets by name, at least one, none called 'id', 'edges' or 'mean'.")
    candidates = {
        name: score.candidates if isinstance(score, Search) else (score,) for name, score in by_name.items()
    }
    for name, score in by_name.items():
        if isinstance(score, Search) and (validation is None or not validation_ood):
            raise UserError(f"scores: '{name}' searches; give 'validation' and 'validation_ood' data sets.")
        if train is None and any(candidate.fit for candidate in candidates[name]):
            raise UserError(f"train: '{name}' is fitted; give the training set.")
    if train is not None and "label" not in train:
        raise UserError("train: it has no column 'label', which scores are fitted with.")
    compiled = {name: tuple(map(_Compiled, scores)) for name, scores in candidates.items()}
    sets = {"id": dataset, **ood}
    searched = {"id": validation, **(validation_ood or {})}

    def measure(index: int, id_scores: np.ndarray, ood_scores: np.ndarray) -> dict[str, float]:
        if n_ood is None:
            return ood_metrics(id_scores, ood_scores, positive=positive, rule=rule)
        key = jax.random.fold_in(jax.random.key(0), index)
        drawn = evaluate_draws(
            key, id_scores, ood_scores, n_ood=n_ood, repeats=draws, positive=positive, rule=rule
        )
        return {name: value for name, value in drawn.items() if not name.endswith("_std")}

    def evaluate(predict: Callable[[State, Batch], Outputs], state: State) -> dict[str, Any]:
        head = network_head(state)
        if head is None and any(score.fit for scores in compiled.values() for score in scores):
            raise UserError(
                "scores: fitted ones need a network with a last layer params['head']; take others."
            )

        def outputs_of(columns: Dataset, predict: Callable = predict) -> dict[str, np.ndarray]:
            return collect_outputs(
                predict, state, columns, batch_size=batch_size, transforms=transforms, keys=None
            )

        def values_of(
            score: _Compiled, params: Any, columns: Mapping[str, Dataset], outputs: Mapping[str, Outputs]
        ) -> dict[str, np.ndarray]:
            if score.perturb is not None:
                moved = score.moved(predict)
                outputs = {
                    name: outputs_of(c, lambda state, batch: moved(state, params, batch))
                    for name, c in columns.items()
                }
            return {
                name: np.asarray(score.score(params, out, head), np.float64) for name, out in outputs.items()
            }

        fitted_on = outputs_of(train) if train is not None else None
        outputs = {name: outputs_of(columns) for name, columns in sets.items()}
        is_searching = any(len(scores) > 1 for scores in compiled.values())
        searched_outputs = {name: outputs_of(c) for name, c in searched.items()} if is_searching else {}
        metrics: dict[str, Any] = {}
        for position, (name, scores) in enumerate(compiled.items()):
            params = [s.fit(fitted_on, train["label"], head) if s.fit else None for s in scores]
            chosen = 0
            if len(scores) > 1:
                losses = [
                    _mean_fpr95(values_of(score, p, searched, searched_outputs), positive, rule)
                    for score, p in zip(scores, params)
                ]
                chosen = int(np.argmin(losses))
                metrics[f"chosen/{name}"] = np.array([chosen])
            values = values_of(scores[chosen], params[chosen], sets, outputs)
            measured = {
                ood_name: measure(i, values["id"], values[ood_name]) for i, ood_name in enumerate(ood)
            }
            measured["mean"] = {
                metric: float(np.mean([measured[ood_name][metric] for ood_name in ood]))
                for metric in ("fpr95", "auroc", "aupr")
            }
            for row, figures in measured.items():
                metrics |= {f"{name}/{row}/{metric}": value for metric, value in figures.items()}
            metrics[f"threshold/{name}"] = np.array([threshold_at_tpr(values["id"], tpr)])
            if position < _MOST_DRAWN:
                metrics |= {f"histogram/{name}/{key}": x for key, x in _histograms(values).items()}
                metrics |= {f"roc/{name}/{key}": _roc(values["id"], values[key], positive) for key in ood}
        return metrics

    return Evaluator(evaluate, plot)


class _Compiled:
    """A score whose parts are compiled once, for all seeds and evaluations."""

    def __init__(self, score: Score):
        self.fit = score.fit and jax.jit(score.fit)
        self.score = jax.jit(score.score)
        self.perturb = score.perturb
        self._moved: dict[Callable, Callable] = {}

    def moved(self, predict: Callable[[State, Batch], Outputs]) -> Callable[..., Outputs]:
        """`moved(state, params, batch) -> outputs` of the inputs that the score has moved."""
        if predict not in self._moved:

            def outputs(state: State, params: Any, batch: Batch) -> Outputs:
                def of_images(images: jax.Array) -> Outputs:
                    return predict(state, {**batch, "image": images})

                return of_images(self.perturb(of_images, batch["image"], params))

            self._moved[predict] = jax.jit(outputs)
        return self._moved[predict]


def _by_name(scores: Any) -> dict[str, Score | Search]:
    """Scores by the names of their rows."""
    if isinstance(scores, Mapping):
        return {name: _score(score) for name, score in scores.items()}
    names = [
        score if isinstance(score, str) else getattr(score, "name", None) or score.__name__
        for score in scores
    ]
    if len(set(names)) < len(names):
        raise UserError(f"scores: one name comes twice: {', '.join(names)}; give a mapping of other names.")
    return dict(zip(names, map(_score, scores)))


def _score(score: str | LogitScore | Score | Search) -> Score | Search:
    if isinstance(score, (Score, Search)):
        return score
    if callable(score):
        return Score(None, lambda params, outputs, head: score(jnp.asarray(outputs["logits"])))
    builder = known_scores.BUILDERS.get(score)
    if builder is None:
        known = known_scores.BUILDERS
        raise UserError(f"scores: no '{score}'.{nearest(score, known)} Known: {', '.join(known)}.")
    return builder()


def network_head(state: State) -> Head | None:
    """The last layer, (kernel [D, C], bias [C]), of a network of `jaxlab.nn`; None where there is none."""
    layer = getattr(state, "variables", {}).get("params", {}).get("head", {})
    return (layer["kernel"], layer["bias"]) if {"kernel", "bias"} <= set(layer) else None


def _mean_fpr95(values: Mapping[str, np.ndarray], positive: Positive, rule: Rule) -> float:
    """What a search goes by: FPR95 on the validation outliers, the mean over their sets."""
    others = [scores for name, scores in values.items() if name != "id"]
    return float(np.mean([ood_metrics(values["id"], scores, positive, rule)["fpr95"] for scores in others]))


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
      `histogram_<score>`, a panel per OOD set, averaged over seeds; `roc`, a panel per OOD set with a curve
      per score, in a band of one standard error over seeds; and `auroc`, a heat map of all scores and sets.
    """
    pairs = [name.split("/", 2)[1:] for name in results if name.startswith("roc/")]
    drawn, sets = (list(dict.fromkeys(names)) for names in zip(*pairs))
    figures = {f"histogram_{score}": _plot_histograms(results, score, sets) for score in drawn}
    figures["roc"] = _plot_roc(results, drawn, sets)
    scores = [name.split("/")[0] for name in results if name.endswith("/mean/auroc")]
    return figures | {"auroc": _plot_auroc(results, scores, [*sets, "mean"])}


def _plot_auroc(results: Results, scores: list[str], sets: list[str]) -> Figure:
    """AUROC of every score on every set, the mean over seeds."""
    values = np.array([[results[f"{score}/{name}/auroc"]["mean"] for name in sets] for score in scores])
    figure = Figure(figsize=(2.4 + 0.8 * len(sets), 0.9 + 0.28 * len(scores)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(values, cmap="Blues", vmin=0.5, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value > 0.8 else "#333333"
        axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", fontsize=8, color=colour)
    labels = [score.replace("_", " ") for score in scores]
    axes.set_yticks(range(len(scores)), labels, fontsize=8)
    axes.set_xticks(range(len(sets)), [name.replace("_", " ") for name in sets], fontsize=8, rotation=20)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("AUROC in %", fontsize=9)
    return figure


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
