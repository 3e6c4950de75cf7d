"""Reads the activations of every layer of a trained network, measures their channels and draws them."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxlab.core import Batch, Evaluator, Outputs, State, UserError
from jaxlab.methods.activation_asymmetry import metrics
from jaxlab.methods.activation_asymmetry.metrics import Moments
from jaxlab.metrics.outputs import Dataset, Transform, predict_batches

# `act`, the output of an activation, and `out`, what the next layer receives of it, with `norm_in` and
# `norm_out` where a normalisation stands in front of the activation: [B, ..., C].
Layer = Mapping[str, jax.Array]
Results = Mapping[str, Mapping[str, Any]]

_BINS = 40
_MOST_DRAWN = 4  # layers whose channels have histograms
# What has histograms, in their order.
_PANELS = {
    "norm_in": "before batch norm",
    "norm_out": "behind batch norm",
    "act": "activation",
    "out": "as the next layer sees it",
}
_COLOURS = {"most": "#d55e00", "least": "#0072b2", "pooled": "#7f7f7f"}
# Drawn, and few enough to stand beside an accuracy in one table.
_SCALARS = ("skewness", "saturation", "asymmetric_saturation", "hoyer_sparsity")


class Totals(NamedTuple):
    """What batches leave of a layer of C channels.

    Attributes:
      act: moments of each channel of `act`.
      pooled: moments of all values of `act` together.
      means: over the values of each channel, [C].
      lowest: of everything that the layer hands out, by its name, [C].
      highest: likewise.
    """

    act: Moments
    pooled: Moments
    means: dict[str, jax.Array]
    lowest: dict[str, jax.Array]
    highest: dict[str, jax.Array]


def asymmetry(
    dataset: Dataset,
    *,
    bound: float | None = 1.0,
    tau: float = 0.95,
    bins: int = 11,
    delta: float = 0.25,
    relative: bool = True,
    batch_size: int = 256,
    transforms: tuple[Transform, ...] = (),
) -> Evaluator:
    """Measures every channel of every layer that the network hands out (see `jaxlab.nn.from_linen`).

    Two passes over the data, a batch at a time, so that no layer is held whole: the first adds up moments
    and means, the second counts what their results tell where to count.

    Args:
      dataset: held-out columns; a thousand rows or more.
      bound: activations lie in [-bound, bound]; None for one that has none: no saturation is measured.
      tau: of `asymmetric_saturation`.
      bins: of `histogram_saturation`; with an even number it is `saturation`.
      delta: of `near_zero_fraction`.
      relative: whether `delta` is in units of each channel's root mean square.
      batch_size: rows per forward pass.
      transforms: the deterministic transforms of evaluation.

    Returns:
      An evaluator of means over channels, then over layers: `skewness` (its absolute value, of channels that
      vary), `saturation` and `asymmetric_saturation` where there is a bound, and `hoyer_sparsity` of what the
      next layer receives. `layers/<metric>` has the values of each layer, from the input on, and there are
      those of `pooled_skewness` (all channels of a layer taken as one; its absolute value),
      `constant_channels` (the share that does not vary), `near_zero_fraction`, `histogram_saturation`,
      `saturated_fraction` and `mean_asymmetry` too. Its plots are `layers`, the curves of the first four, and
      `channels`, histograms of the channels with the largest and the smallest absolute skewness of the
      activation, before and behind batch normalisation; drawn from `histogram/<layer>/<most or least>/<name>`
      (shares of the values) and `.../<name>_edges`. In the order "convention" the names are `norm_in`,
      `norm_out` and `act`, else `act` and `out`.

    Raises:
      UserError: a bound, `tau`, `bins` or `delta` without sense; in evaluation, a network that hands out no
        activations.
    """
    if bound is not None:  # refuses, before training, what could not be measured
        metrics.asymmetric_saturation(np.zeros((1, 1)), bound, tau)
        metrics.histogram_saturation(np.zeros((1, 1)), bins, bound)
    if delta <= 0:
        raise UserError(f"delta: expected a positive number, got {delta}.")

    @jax.jit
    def total(layers: tuple[Layer, ...]) -> list[Totals]:
        return [_total(layer, bound, tau, bins) for layer in layers]

    @jax.jit
    def near_zero(layers: tuple[Layer, ...], limits: list[jax.Array]) -> list[jax.Array]:
        return [metrics.near_zero_fraction(layer["out"], limit) for layer, limit in zip(layers, limits)]

    @jax.jit
    def finalize(totals: list[Totals]) -> tuple[list[dict[str, jax.Array]], list[dict[str, jax.Array]]]:
        moments = [metrics.moments_finalize(layer.act) for layer in totals]
        return [_means(*layer, bound) for layer in zip(totals, moments)], moments

    def evaluate(predict: Callable[[State, Batch], Outputs], state: State) -> dict[str, Any]:
        def batches() -> Iterator[tuple[Layer, ...]]:
            return _activations(predict, state, dataset, batch_size=batch_size, transforms=transforms)

        totals = jax.device_get(functools.reduce(_merge, map(total, batches())))
        curves, moments = jax.device_get(finalize(totals))
        rms = [np.sqrt(layer.means["square"]) for layer in totals]
        limits = [delta * r if relative else np.full_like(r, delta) for r in rms]
        histograms = _Histograms(totals, moments)
        shares, weights = [], []
        for layers in batches():
            shares.append([np.mean(share) for share in near_zero(layers, limits)])
            weights.append(len(layers[0]["out"]))
            histograms.add(layers)
        for curve, share in zip(curves, np.average(shares, axis=0, weights=weights)):
            curve["near_zero_fraction"] = share

        by_layer = {name: np.array([curve[name] for curve in curves]) for name in curves[0]}
        return (
            {name: by_layer[name].mean() for name in _SCALARS if name in by_layer}
            | {f"layers/{name}": values for name, values in by_layer.items()}
            | histograms.shares()
        )

    return Evaluator(evaluate, plot)


def _activations(
    predict: Callable[[State, Batch], Outputs], state: State, dataset: Dataset, **batches: Any
) -> Iterator[tuple[Layer, ...]]:
    """The layers' activations, a batch at a time."""
    asking = state._replace(variables={**state.variables, "intermediates": {}})
    for outputs, rows in predict_batches(predict, asking, dataset, **batches):
        if not outputs.get("activations"):
            raise UserError(
                "network: it hands out no activations; those of jaxlab.nn with norm and activation do, where"
                " the method predicts with one of them."
            )
        yield jax.tree.map(lambda x, rows=rows: x if len(x) == rows else x[:rows], outputs["activations"])


def _total(layer: Layer, bound: float | None, tau: float, bins: int) -> Totals:
    act, out = layer["act"], layer["out"]
    channels = act.shape[-1]
    axes = tuple(range(act.ndim - 1))
    means = {"absolute": jnp.abs(out).mean(axes), "square": jnp.square(out).mean(axes)}
    if bound is not None:
        hi, lo, _ = metrics.asymmetric_saturation(act, bound, tau)
        middle, outside = metrics.middle_bin_means(act, bins, bound)
        saturation = metrics.channel_saturation(act, bound)
        means |= {"saturation": saturation, "hi": hi, "lo": lo, "middle": middle, "outside": outside}
    return Totals(
        metrics.moments_update(metrics.moments_init(channels), act),
        metrics.moments_update(metrics.moments_init(1), act.reshape(-1, 1)),
        means,
        {name: x.min(axes) for name, x in layer.items()},
        {name: x.max(axes) for name, x in layer.items()},
    )


@jax.jit
def _merge(one: list[Totals], other: list[Totals]) -> list[Totals]:
    def merge(a: Totals, b: Totals) -> Totals:
        act = metrics.moments_merge(a.act, b.act)
        share = b.act.count / act.count
        return Totals(
            act,
            metrics.moments_merge(a.pooled, b.pooled),
            jax.tree.map(lambda x, y: x + (y - x) * share, a.means, b.means),
            jax.tree.map(jnp.minimum, a.lowest, b.lowest),
            jax.tree.map(jnp.maximum, a.highest, b.highest),
        )

    return [merge(*pair) for pair in zip(one, other)]


def _means(totals: Totals, act: dict[str, jax.Array], bound: float | None) -> dict[str, jax.Array]:
    """A layer's means over its channels; `act` are the finalized moments of each."""
    pooled, means = metrics.moments_finalize(totals.pooled), totals.means
    hoyer = metrics.hoyer_of_means(totals.act.count, means["absolute"], means["square"])
    measured = {
        "skewness": metrics.layer_mean(jnp.abs(act["skewness"]), act["valid"]),
        "pooled_skewness": jnp.abs(pooled["skewness"][0]),
        "constant_channels": jnp.mean(~act["valid"]),
        "hoyer_sparsity": jnp.mean(hoyer),
    }
    if bound is not None:
        measured |= {
            "saturation": jnp.mean(means["saturation"]),
            "histogram_saturation": jnp.mean(jnp.abs(means["middle"]) + means["outside"]) / bound,
            "saturated_fraction": jnp.mean(means["hi"] + means["lo"]),
            "asymmetric_saturation": jnp.mean(jnp.abs(means["hi"] - means["lo"])),
            "mean_asymmetry": jnp.mean(jnp.abs(act["mean"])) / bound,
        }
    return measured


class _Histograms:
    """Counts the values of a few layers' most and least skewed channels."""

    def __init__(self, totals: list[Totals], moments: list[dict[str, np.ndarray]]):
        self._edges: dict[str, np.ndarray] = {}
        self._counts: dict[str, np.ndarray] = {}
        self._channels: dict[int, dict[str, int]] = {}
        self._names: dict[int, list[str]] = {}
        self._skewness: dict[str, np.ndarray] = {}
        for i in np.unique(np.linspace(0, len(totals) - 1, _MOST_DRAWN).astype(int)):
            skewness = moments[i]["skewness"]
            size = np.where(moments[i]["valid"], np.abs(skewness), np.nan)
            if np.isnan(size).all():
                continue
            self._names[i] = [name for name in _PANELS if name in totals[i].lowest]
            if "norm_in" in self._names[i]:
                self._names[i].remove("out")  # it is `act`
            self._channels[i] = {"most": int(np.nanargmax(size)), "least": int(np.nanargmin(size))}
            for which, channel in self._channels[i].items():
                self._skewness[f"{i + 1}/{which}"] = skewness[[channel]]
                for name in self._names[i]:
                    low, high = totals[i].lowest[name][channel], totals[i].highest[name][channel]
                    key = f"{i + 1}/{which}/{name}"
                    self._edges[key] = np.linspace(low, high, _BINS + 1)
                    self._counts[key] = np.zeros(_BINS)

    def add(self, layers: tuple[Layer, ...]) -> None:
        for i, channels in self._channels.items():
            picked = np.array(list(channels.values()))
            for name in self._names[i]:
                values = np.asarray(jnp.take(layers[i][name], picked, axis=-1), np.float64)
                for position, which in enumerate(channels):
                    key = f"{i + 1}/{which}/{name}"
                    edges = self._edges[key]
                    inside = np.clip(values[..., position], edges[0], edges[-1])
                    self._counts[key] += np.histogram(inside, edges)[0]

    def shares(self) -> dict[str, np.ndarray]:
        return (
            {f"histogram/{key}": counts / counts.sum() for key, counts in self._counts.items()}
            | {f"histogram/{key}_edges": edges for key, edges in self._edges.items()}
            | {f"histogram/{key}/skewness": value for key, value in self._skewness.items()}
        )


def plot(results: Results) -> dict[str, Figure]:
    """Draws the curves of `asymmetry`.

    Args:
      results: metric -> `mean`, `stderr` and `values` over seeds.

    Returns:
      `layers`: a panel a metric, a point a layer, in bands of one standard error over seeds. `channels`: of
      the first seed, where a layer has a channel that varies.
    """
    figures = {"layers": _plot_layers(results)}
    drawn = sorted({int(name.split("/")[1]) for name in results if name.startswith("histogram/")})
    return figures | ({"channels": _plot_channels(results, drawn)} if drawn else {})


def _plot_layers(results: Results) -> Figure:
    shown = [name for name in _SCALARS if f"layers/{name}" in results]
    figure = Figure(figsize=(2.9 * len(shown), 2.7), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        lines = [(name, _COLOURS["most"], "mean over channels")]
        if name == "skewness":
            lines.append(("pooled_skewness", _COLOURS["pooled"], "all channels as one"))
        for metric, colour, label in lines:
            curve = results[f"layers/{metric}"]
            mean, stderr = np.asarray(curve["mean"]), np.nan_to_num(np.asarray(curve["stderr"]))
            places = np.arange(1, len(mean) + 1)
            axes.plot(places, mean, color=colour, marker="o", markersize=3, linewidth=1.5, label=label)
            axes.fill_between(places, mean - stderr, mean + stderr, color=colour, alpha=0.2, linewidth=0)
        if len(lines) > 1:
            axes.legend(fontsize=7, frameon=False)
        axes.set_title(name.replace("_", " "), loc="left", fontsize=9)
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelsize=8, length=0)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("layer, from the input on", fontsize=9)
    return figure


def _plot_channels(results: Results, layers: list[int]) -> Figure:
    """A row a layer: its most and its least skewed channel, each before and behind batch normalisation."""
    shown = [[name for name in _PANELS if f"histogram/{i}/most/{name}" in results] for i in layers]
    width = max(map(len, shown))
    figure = Figure(figsize=(2.25 * 2 * width, 0.5 + 1.9 * len(layers)), layout="constrained")
    panels = figure.subplots(len(layers), 2 * width, squeeze=False)
    for axes in panels.ravel():
        axes.set_visible(False)
    for row, layer, names in zip(panels, layers, shown):
        for which, half in (("most", row[:width]), ("least", row[width:])):
            place = f"histogram/{layer}/{which}"
            skewness = np.asarray(results[f"{place}/skewness"]["values"][0]).item()
            for axes, name in zip(half, names):
                shares, edges = (
                    np.asarray(results[f"{place}/{key}"]["values"][0]) for key in (name, f"{name}_edges")
                )
                axes.stairs(shares, edges, fill=True, color=_COLOURS[which], alpha=0.6)
                of_activation = f", {which} skewed: {skewness:+.2f}" if name == "act" else ""
                axes.set_title(_PANELS[name] + of_activation, loc="left", fontsize=8)
                axes.tick_params(labelsize=7, length=0)
                axes.spines[["top", "right"]].set_visible(False)
                axes.set_visible(True)
        row[0].set_ylabel(f"layer {layer}", fontsize=9)
    figure.supylabel("share of values", fontsize=9)
    return figure
