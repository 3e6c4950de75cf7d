"""Training curves: mean ± standard error over the seeds, one panel a metric, one line a run."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from jaxlab.core.statistics import mean_and_stderr
from jaxlab.report.runs import Curve, Run
from jaxlab.report.tables import is_fraction, words

# Okabe and Ito's colours, told apart with any colour vision, less the yellow that white paper swallows.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
_LINES = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1)))  # so that no line hides another
_INK, _RULE = "#3b4252", "#d8dee9"


def color(index: int) -> str:
    """Returns the colour of the run at `index`."""
    return PALETTE[index % len(PALETTE)]


def panels(runs: Sequence[Run]) -> Iterator[tuple[str, str, str, Figure]]:
    """Yields `(stage, split, metric, figure)` for every metric with a curve to draw.

    Left out are metrics logged only once or never with a value, and those of groups within groups other
    than their mean, which would be hundreds.
    """
    curves: dict[tuple[str, str, str], dict[int, Curve]] = {}
    for index, run in enumerate(runs):
        for part in run.parts():
            for (split, metric), curve in part.history.items():
                shown = metric.count("/") < 3 or "/mean/" in metric
                if shown and len(curve.steps) > 1 and not np.isnan(curve.values).all():
                    curves.setdefault((part.stage, split, metric), {})[index] = curve
    for (stage, split, metric), lines in curves.items():
        yield stage, split, metric, draw_curves(metric, lines, [run.name for run in runs])


def draw_curves(metric: str, curves: Mapping[int, Curve], names: Sequence[str]) -> Figure:
    """Draws `{index of the run: curve}`; `names` are those of all runs and label the lines if several."""
    legend_rows = len(curves) if len(names) > 1 else 0
    below = 0.5 + 0.17 * legend_rows
    height = 2.5 + below
    figure = Figure(figsize=(4.2, height), dpi=160)
    # Margins in inches, the left one for "100.0000%": a layout engine would double the time of many panels.
    figure.subplots_adjust(
        left=0.74 / 4.2, right=1 - 0.16 / 4.2, top=1 - 0.32 / height, bottom=below / height
    )
    axes = figure.add_subplot()
    axes.locator_params(nbins=5)
    lowest, highest = np.inf, -np.inf
    for index, (steps, values) in curves.items():
        mean, stderr = mean_and_stderr(values.T)
        line = _LINES[index % len(_LINES)]
        # The space keeps a name that opens with "_" in the legend; "$" would start a formula.
        label = " " + names[index].replace("$", r"\$")
        axes.plot(steps, mean, color=color(index), linestyle=line, linewidth=1.6, label=label)
        axes.fill_between(steps, mean - stderr, mean + stderr, color=color(index), alpha=0.2, linewidth=0)
        lowest, highest = np.nanmin([lowest, *mean]), np.nanmax([highest, *mean])
    if 0 < lowest < highest / 100 < np.inf:
        axes.set_yscale("log")
    axes.set_title(words(metric).replace("/", " · "), loc="left", x=-0.12, fontsize=10, color=_INK)
    axes.set_xlabel("step", fontsize=9, color=_INK)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if is_fraction(metric.split("/")[-1]):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.margins(x=0.01)
    axes.grid(axis="y", color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.tick_params(labelsize=8.5, labelcolor=_INK, length=0, which="both")
    if legend_rows:
        figure.legend(loc="lower left", fontsize=8, frameon=False, labelcolor=_INK, borderaxespad=0)
    return figure
