"""How well a classifier does in each domain, on the part that was trained on and on the part held out."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jaxlab.core import Batch, Evaluator, Outputs, State, UserError
from jaxlab.core.errors import nearest
from jaxlab.methods.domain_generalization.model_selection import holdout_split
from jaxlab.metrics.outputs import Dataset, Transform, collect_outputs

Part = Literal["in", "out"]


def holdout(
    dataset: Dataset, *, part: Part, environment: int, trial_seed: int = 0, holdout_fraction: float = 0.2
) -> Dataset:
    """One part of a domain as DomainBed splits it (see `holdout_split`), in its order.

    Args:
      dataset: columns of N rows.
      part: "in", which is trained on, or "out", which is held out for validation.
      environment: the position of the domain.
      trial_seed: DomainBed's; each trial has another split.
      holdout_fraction: the share of "out".
    """
    size = len(next(iter(dataset.values())))
    in_rows, out_rows = holdout_split(size, trial_seed, environment, holdout_fraction)
    rows = np.asarray(in_rows if part == "in" else out_rows)
    return {name: column[rows] for name, column in dataset.items()}


def domain_accuracy(
    domains: Mapping[str, Mapping[str, Dataset]],
    *,
    test_domains: tuple[str, ...],
    batch_size: int = 512,
    transforms: tuple[Transform, ...] = (),
) -> Evaluator:
    """Accuracy in each part of each domain, what `launch.model_selection` chooses models by.

    Args:
      domains: name → {"in": columns, "out": columns}, in DomainBed's order.
      test_domains: those that were not trained on; selection reads it from the config.
      batch_size: rows per forward pass.
      transforms: the deterministic transforms of evaluation.

    Returns:
      An evaluator of `<domain>/in_accuracy` and `<domain>/out_accuracy`.

    Raises:
      UserError: a test domain is none of the domains, or a domain has other parts.
    """
    for name in test_domains:
        if name not in domains:
            raise UserError(f"test_domains: no domain '{name}'.{nearest(name, domains)}")
    for name, parts in domains.items():
        if set(parts) != {"in", "out"}:
            raise UserError(f"domains.{name}: expected the parts 'in' and 'out', got {', '.join(parts)}.")

    def evaluate(predict: Callable[[State, Batch], Outputs], state: State) -> dict[str, Any]:
        results = {}
        for domain, parts in domains.items():
            for part in ("in", "out"):
                outputs = collect_outputs(
                    predict, state, parts[part], batch_size=batch_size, transforms=transforms
                )
                hit = outputs["logits"].argmax(-1) == parts[part]["label"]
                results[f"{domain}/{part}_accuracy"] = float(hit.mean())
        return results

    def plot(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
        return {
            "domains": _plot_accuracy(results, tuple(domains), test_domains),
            "examples": _plot_examples(domains, test_domains),
        }

    return Evaluator(evaluate, plot)


def _label(domain: str, test_domains: tuple[str, ...]) -> str:
    return f"{domain}\n(test)" if domain in test_domains else domain


def _plot_accuracy(
    results: Mapping[str, Mapping[str, Any]], domains: tuple[str, ...], test_domains: tuple[str, ...]
) -> Figure:
    figure = Figure(figsize=(max(3.6, 1.2 * len(domains)), 3.4), layout="constrained")
    axes = figure.add_subplot()
    for offset, part, colour in ((-0.2, "in", "#0072b2"), (0.2, "out", "#e69f00")):
        shown = [results[f"{domain}/{part}_accuracy"] for domain in domains]
        heights = [result["mean"] for result in shown]
        errors = [np.nan_to_num(result["stderr"]) for result in shown]
        places = np.arange(len(domains)) + offset
        axes.bar(places, heights, 0.4, yerr=errors, color=colour, capsize=3, label=f"{part} split")
    axes.set_xticks(range(len(domains)), [_label(domain, test_domains) for domain in domains])
    axes.set(ylim=(0, 1), ylabel="accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=2)
    return figure


def _plot_examples(
    domains: Mapping[str, Mapping[str, Dataset]], test_domains: tuple[str, ...], count: int = 8
) -> Figure:
    """A row a domain, all on one scale of brightness."""
    figure = Figure(figsize=(1.3 + 0.75 * count, 0.8 * len(domains)), layout="constrained")
    rows = figure.subplots(len(domains), count, squeeze=False)
    shown = {name: np.asarray(parts["in"]["image"][:count], np.float32) for name, parts in domains.items()}
    low = min(images.min() for images in shown.values())
    high = max(images.max() for images in shown.values())
    for panels, (domain, images) in zip(rows, shown.items()):
        if images.shape[-1] == 2:  # red and green, as Coloured MNIST is drawn in its paper
            images = np.pad(images, ((0, 0),) * 3 + ((0, 1),), constant_values=low)
        images = (images - low) / max(high - low, 1e-8)
        for axes, image in zip(panels, images):
            axes.imshow(image, cmap="gray", vmin=0, vmax=1)
        for axes in panels:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        label = _label(domain, test_domains)
        panels[0].set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
    return figure
