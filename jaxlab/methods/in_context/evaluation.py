"""What a network has learnt to do with a prompt, beside the algorithms it might be running.

The errors and prompt shifts are those of Garg et al., NeurIPS 2022 (arXiv 2208.01066), but here the network
and all baselines are given the same prompts. Distances to algorithms are those of Akyürek et al., *What
Learning Algorithm is In-Context Learning?* (ICLR 2023), and von Oswald et al., *Transformers Learn In-Context
by Gradient Descent* (ICML 2023).

Every prompt is a function of an evaluator's arguments: all seeds, checkpoints and runs meet the same.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxlab.core import Batch, Evaluator, Outputs, State, UserError
from jaxlab.methods.in_context.baselines import Baseline
from jaxlab.methods.in_context.functions import FunctionClass, sign_accuracy
from jaxlab.methods.in_context.prompts import (
    Shift,
    aggregate,
    query_gradients,
    sample_prompts,
    span_projection,
)
from jaxlab.metrics.outputs import collect_outputs

_INK, _RULE = "#3b4252", "#d8dee9"
_COLORS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
_MODEL_COLOR = "#0072B2"
_STYLES = ((0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1)))

PredictFn = Callable[[State, Batch], Outputs]


class PromptKind(NamedTuple):
    """A distribution of evaluation prompts; see `prompt_kind`."""

    function: FunctionClass
    dimension: int
    num_points: int
    shift: Shift | None
    target: FunctionClass
    normalizer: float
    trained_points: int


def prompt_kind(
    function: FunctionClass,
    *,
    dimension: int,
    num_points: int,
    shift: Shift | None = None,
    target: FunctionClass | None = None,
    normalizer: float | None = None,
    trained_points: int | None = None,
) -> PromptKind:
    """A distribution of prompts to evaluate on, of K = `num_points` points in d = `dimension` dimensions.

    Args:
      function: what the labels are of. A pool in training and the whole class here makes the tasks fresh; a
        class the network was not trained on makes them out of class.
      dimension: d.
      num_points: K. More than were trained on shows whether the network goes on to longer prompts.
      shift: of the inputs; see `jaxlab.methods.in_context.prompts`. None: as in training.
      target: what predictions are held against, with the parameters of `function`; None: `function` itself,
        its noise included. With the noiseless class, errors are those to the noise-free oracle.
      normalizer: what errors are divided by; None: `normalizer(d)` of `target`. For `scale_x` times c the
        paper has c² d.
      trained_points: the K of training, which figures mark; None: `num_points`.

    Raises:
      UserError: no dimension or no point.
    """
    _check(dimension=dimension, num_points=num_points)
    target = function if target is None else target
    return PromptKind(
        function,
        dimension,
        num_points,
        shift,
        target,
        target.normalizer(dimension) if normalizer is None else normalizer,
        num_points if trained_points is None else trained_points,
    )


class _Prompts(NamedTuple):
    """Prompts as drawn: prediction i is for query[:, i], after the i pairs of context and ys before it."""

    context: np.ndarray  # [N, K, d]
    ys: np.ndarray  # [N, K]
    query: np.ndarray | None  # [N, K, d]; None: the context's own
    targets: np.ndarray  # [N, K]


def paired_errors(
    prompts: Mapping[str, PromptKind],
    *,
    baselines: Mapping[str, Baseline] | None = None,
    num_prompts: int = 1280,
    batch_size: int = 256,
    seed: int = 0,
) -> Evaluator:
    """The error after each number of examples, of a network and of baselines on the same prompts.

    Args:
      prompts: name → `prompt_kind`; all with squared errors, or all with labels in {-1, 1}.
      baselines: name → baseline.
      num_prompts: N, of each kind, each prompt with a function of its own.
      batch_size: prompts per forward pass. Queries of their own for every prefix take K passes.
      seed: of the prompts and of the bootstrap.

    Returns:
      An evaluator of `<algorithm>/<metric>`, or `<algorithm>/<prompts>/<metric>` where there are several
      kinds. The algorithms are `model` and the baselines. The metrics are the curves `error`, `low` and
      `high` over i = 0, ..., K - 1 examples, the mean over prompts and its 90% bootstrap interval, over the
      normalizer, and the numbers `mean_error`, over i, and `last_error`; classes with labels in {-1, 1} have
      `accuracy` for `error`. A baseline has `distance` too, the mean of (network - baseline)² over the
      normalizer, and `mean_distance`. The plots have a panel for each kind.

    Raises:
      UserError: no prompts, a baseline called "model", or an argument out of range.
    """
    _check(prompts=len(prompts), num_prompts=num_prompts, batch_size=batch_size)
    baselines = dict(baselines or {})
    if "model" in baselines:
        raise UserError("baselines: 'model' is the network; give the baseline another name.")
    leaves = {_leaf(kind) for kind in prompts.values()}
    if len(leaves) > 1:
        raise UserError("prompts: some have squared errors and some accuracies; give each an evaluator.")
    (leaf,) = leaves

    @functools.cache
    def drawn(name: str) -> _Prompts:
        return _draw(prompts[name], seed, num_prompts)

    @functools.cache
    def of_baselines(name: str) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
        """Predictions and errors of each, the same at every evaluation."""
        preds = {b: _run_baseline(baseline, drawn(name), batch_size) for b, baseline in baselines.items()}
        return {b: (values, errors(name, values)) for b, values in preds.items()}

    def errors(name: str, preds: np.ndarray) -> dict[str, Any]:
        kind = prompts[name]
        values = kind.target.metric(jnp.asarray(preds), jnp.asarray(drawn(name).targets)) / kind.normalizer
        curves = jax.device_get(_aggregate(values, jax.random.key(seed)))
        summary = {f"mean_{leaf}": curves["mean"].mean(), f"last_{leaf}": curves["mean"][-1]}
        return {leaf: curves["mean"], "low": curves["low"], "high": curves["high"], **summary}

    def evaluate(predict: PredictFn, state: State) -> dict[str, Any]:
        metrics = {}
        for name, kind in prompts.items():
            preds = _run_model(predict, state, drawn(name), batch_size)
            measured = {"model": errors(name, preds)}
            for baseline, (others, its_errors) in of_baselines(name).items():
                distance = np.mean((preds - others) ** 2, axis=0) / kind.normalizer
                measured[baseline] = its_errors | {"distance": distance, "mean_distance": distance.mean()}
            for algorithm, values in measured.items():
                metrics |= {f"{place(algorithm, name)}/{metric}": value for metric, value in values.items()}
        return metrics

    def place(algorithm: str, name: str) -> str:
        return f"{algorithm}/{name}" if len(prompts) > 1 else algorithm

    def plot(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
        def panels(algorithms: list[str], curve: str, label: str) -> Figure:
            figure, axes = _panels(list(prompts), label)
            for ax, (name, kind) in zip(axes, prompts.items()):
                for i, algorithm in enumerate(algorithms):
                    at = place(algorithm, name)
                    interval = (
                        [results[f"{at}/{bound}"] for bound in ("low", "high")] if curve == leaf else []
                    )
                    _draw_curve(ax, algorithm, i, results[f"{at}/{curve}"], *interval)
                _finish(ax, kind, unit=curve == "error", zero=curve == "accuracy")
            _legend(figure, axes[0])
            return figure

        label = "accuracy" if leaf == "accuracy" else "squared error"
        figures = {leaf: panels([*baselines, "model"], leaf, label)}
        if baselines:
            figures["distance"] = panels(list(baselines), "distance", "squared difference to the network")
        return figures

    return Evaluator(evaluate, plot)


def _leaf(kind: PromptKind) -> str:
    return "accuracy" if kind.target.metric is sign_accuracy else "error"


def algorithm_distance(
    function: FunctionClass,
    *,
    dimension: int,
    num_points: int,
    algorithms: Mapping[str, Baseline],
    num_prompts: int = 64,
    num_queries: int | None = None,
    seed: int = 0,
) -> Evaluator:
    """How far a network is from algorithms for linear functions, by the weights and gradients they imply.

    After each number of examples the network is asked for the labels of many fresh queries; the least-squares
    fit of a linear function to its answers is its implicit weight vector (Akyürek et al., section 4).

    Args:
      function: the class of the prompts; parameters with `w` [N, d] give `gradient_alignment`.
      dimension: d.
      num_points: K.
      algorithms: name → baseline that can be differentiated at its query.
      num_prompts: N.
      num_queries: fresh inputs N(0, I), the same for all prompts and prefixes; 4 d if None. The network runs
        on N prompts K times for each.
      seed: of prompts and queries.

    Returns:
      An evaluator of these curves over i = 0, ..., K - 1 examples, each a mean over prompts. For each
      algorithm, `weight_distance`, |w_network - w_algorithm|² / d, and `gradient_cosine`, of the gradients of
      both predictions in the query (0 where either is zero). For `model`, `linearity`, the fraction of its
      answers' sum of squares that is linear in the query, and `gradient_alignment` with the projection of w
      on the span of the examples. `mean_...` of each over i. Plots are `weight_distance` and
      `gradient_cosine`.

    Raises:
      UserError: no more queries than dimensions, or an argument out of range.
    """
    _check(dimension=dimension, num_points=num_points, num_prompts=num_prompts)
    num_queries = 4 * dimension if num_queries is None else num_queries
    if num_queries <= dimension:
        raise UserError(f"num_queries: expected more than the {dimension} dimensions, got {num_queries}.")

    @functools.cache
    def drawn() -> tuple[chex.ArrayTree, np.ndarray, np.ndarray, np.ndarray]:
        key, query_key = jax.random.split(jax.random.key(seed))
        params, xs, ys = sample_prompts(key, 0, function, num_prompts, num_points, dimension)
        queries = jax.random.normal(query_key, (num_queries, dimension))
        return jax.device_get((params, xs, ys, queries))

    @functools.cache
    def of_algorithms() -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The implicit weights and the gradients of each."""
        _, xs, ys, queries = drawn()
        found = {}
        for name, algorithm in algorithms.items():
            answers = [algorithm(xs, ys, np.broadcast_to(query, xs.shape)) for query in queries]
            gradient = jax.grad(lambda query, a=algorithm: jnp.sum(a(xs, ys, query)))(jnp.asarray(xs))
            found[name] = implicit_weights(queries, np.stack(answers))[0], gradient
        return found

    def evaluate(predict: PredictFn, state: State) -> dict[str, Any]:
        params, xs, ys, queries = drawn()

        def answer(query: np.ndarray) -> np.ndarray:
            asked = _Prompts(xs, ys, np.broadcast_to(query, xs.shape), ys)
            return _run_model(predict, state, asked, num_prompts)

        weights, linearity = implicit_weights(queries, np.stack([answer(query) for query in queries]))
        gradient = _gradients(predict, state, xs, ys)
        curves = {"model/linearity": linearity.mean(0)}
        if isinstance(params, Mapping) and "w" in params:
            aligned = _cosine(gradient, span_projection(xs, params["w"]))
            curves["model/gradient_alignment"] = aligned.mean(0)
        for name, (other_weights, other_gradient) in of_algorithms().items():
            distance = np.sum((weights - other_weights) ** 2, axis=-1) / dimension
            curves[f"{name}/weight_distance"] = distance.mean(0)
            curves[f"{name}/gradient_cosine"] = _cosine(gradient, other_gradient).mean(0)
        means = {"/mean_".join(name.split("/")): curve.mean() for name, curve in curves.items()}
        return curves | means

    def plot(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
        labels = {
            "weight_distance": "implicit weights, |Δw|² / d",
            "gradient_cosine": "cosine of gradients",
        }
        figures = {}
        for leaf, label in labels.items():
            figures[leaf], (ax,) = _panels([""], label)
            for i, name in enumerate(algorithms):
                _draw_curve(ax, name, i, results[f"{name}/{leaf}"])
            ax.set_ylim(**({"top": 1.02} if leaf == "gradient_cosine" else {"bottom": 0}))
            _legend(figures[leaf], ax)
        return figures

    return Evaluator(evaluate, plot)


def implicit_weights(queries: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The linear functions that fit answers best, without an intercept.

    Args:
      queries: [Q, d], Q above d.
      answers: [Q, B, K], what was predicted for each query after each prefix.

    Returns:
      Weights [B, K, d], and the share [B, K] of the answers' sum of squares that they explain; 1 where all
      answers are 0.
    """
    queries, answers = np.asarray(queries, np.float64), np.asarray(answers, np.float64)
    weights = np.einsum("dq,qbk->bkd", np.linalg.pinv(queries), answers)
    residuals = answers - np.einsum("qd,bkd->qbk", queries, weights)
    total = np.sum(answers**2, axis=0)
    return weights, 1 - np.sum(residuals**2, axis=0) / np.where(total > 0, total, 1)


def _check(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name}: expected 1 or more, got {value}.")


def _draw(kind: PromptKind, seed: int, num_prompts: int) -> _Prompts:
    """One jitted program, whose arrays come to the host."""

    @jax.jit
    def draw(key: chex.PRNGKey) -> _Prompts:
        prompt_key, shift_key, noise_key = jax.random.split(key, 3)
        sizes = num_prompts, kind.num_points, kind.dimension
        params, xs, _ = sample_prompts(prompt_key, 0, kind.function, *sizes)
        context, query = (xs, None) if kind.shift is None else kind.shift(shift_key, xs)
        ys = kind.function.evaluate(params, context, noise_key)
        asked = context if query is None else query
        return _Prompts(context, ys, query, kind.target.evaluate(params, asked, noise_key))

    return jax.device_get(draw(jax.random.key(seed)))


def _run_model(predict: PredictFn, state: State, prompts: _Prompts, batch_size: int) -> np.ndarray:
    """Predictions [N, K]."""

    def run(xs: np.ndarray) -> np.ndarray:
        dataset = {"xs": xs, "ys": prompts.ys}
        return collect_outputs(predict, state, dataset, batch_size=batch_size, keys=("predictions",))[
            "predictions"
        ]

    if prompts.query is None:
        return run(prompts.context)
    points = np.arange(prompts.ys.shape[1])
    asked = (np.where((points == i)[:, None], prompts.query, prompts.context) for i in points)
    return np.stack([run(xs)[:, i] for i, xs in enumerate(asked)], axis=1)


def _run_baseline(baseline: Baseline, prompts: _Prompts, batch_size: int) -> np.ndarray:
    """Predictions [N, K], a batch at a time, the last one filled up so that all are one compilation."""
    query = prompts.context if prompts.query is None else prompts.query
    size = len(query)
    preds = []
    for start in range(0, size, batch_size):
        rows = np.minimum(np.arange(start, start + min(batch_size, size)), size - 1)
        part = baseline(prompts.context[rows], prompts.ys[rows], query[rows])
        preds.append(np.asarray(part)[: size - start])
    return np.concatenate(preds)


_aggregate = jax.jit(aggregate)


# At module level and with the one `predict` of a run, so that all evaluations share a compilation.
@functools.partial(jax.jit, static_argnums=0)
def _gradients(predict: PredictFn, state: State, xs: np.ndarray, ys: np.ndarray) -> jax.Array:
    def predictions(xs: jax.Array, ys: jax.Array) -> jax.Array:
        return predict(state, {"xs": xs, "ys": ys})["predictions"]

    return query_gradients(predictions, xs, ys)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.sum(a * b, axis=-1) / np.where(norms > 0, norms, 1)


def _panels(names: list[str], label: str) -> tuple[Figure, list[Axes]]:
    """Panels over the number of examples, at most three a row, each titled."""
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    width = 4.8 if columns == 1 else 3.1 * columns
    figure = Figure(figsize=(width, 0.5 + (3.0 if columns == 1 else 2.5) * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[len(names) :]:
        ax.remove()
    for i, (ax, name) in enumerate(zip(axes, names)):
        ax.set_title(name.replace("_", " ") if len(names) > 1 else "", loc="left", fontsize=9, color=_INK)
        ax.set_xlabel("in-context examples", fontsize=9, color=_INK)
        if i % columns == 0:
            ax.set_ylabel(label, fontsize=9, color=_INK)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y", color=_RULE, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8, length=0)
    return figure, axes[: len(names)]


def _draw_curve(
    axes: Axes, algorithm: str, index: int, curve: Mapping[str, Any], *interval: Mapping[str, Any]
) -> None:
    """A baseline in dashes of its own; the network with its seeds as thin lines."""
    style = dict(color=_COLORS[index % len(_COLORS)], linestyle=_STYLES[index % len(_STYLES)], linewidth=1.5)
    label, mean = algorithm.replace("_", " "), np.asarray(curve["mean"])
    if algorithm == "model":
        style, label = dict(color=_MODEL_COLOR, linewidth=2, zorder=3), "network"
        for values in curve["values"] if len(curve["values"]) > 1 else ():
            axes.plot(np.asarray(values), color=_MODEL_COLOR, linewidth=0.7, alpha=0.5)
    axes.plot(mean, label=label, marker="o", markersize=2.5 if len(mean) < 30 else 0, **style)
    if interval:
        low, high = (np.asarray(bound["mean"]) for bound in interval)
        axes.fill_between(np.arange(len(mean)), low, high, color=style["color"], alpha=0.15, linewidth=0)


def _finish(axes: Axes, kind: PromptKind, *, unit: bool, zero: bool) -> None:
    """Limits, and marks at the zero predictor's error and at the end of what was trained."""
    drawn = np.concatenate([np.ravel(line.get_ydata()) for line in axes.lines])
    highest = np.max(drawn[np.isfinite(drawn)], initial=0)
    if unit:
        axes.axhline(1, color=_INK, linewidth=0.8, linestyle=":", zorder=0)
    # Averaging and noisy least squares go far above what the others can be read at.
    axes.set_ylim(0, 1.02 if zero else min(1.05 * highest, 1.8) or 1)
    if kind.trained_points < kind.num_points:
        axes.axvspan(kind.trained_points - 0.5, kind.num_points - 1, color=_RULE, alpha=0.5, zorder=0)
        axes.text(kind.trained_points - 0.4, 0.97, "untrained", fontsize=8, color=_INK, va="top",
                  transform=axes.get_xaxis_transform())  # fmt: skip


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if len(figure.axes) < 3 else 6
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=8, frameon=False)
