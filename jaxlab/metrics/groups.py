"""Accuracy of each class with each attribute, for data whose attribute is spuriously tied to the class.

An example is bias-aligned where its attribute is the one that goes with its class, else bias-conflicting.
The summary is the protocol of Nam et al., *Learning from Failure*, NeurIPS 2020 (arXiv 2007.02561).
"""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxlab.core import Batch, Evaluator, Outputs, State, UserError
from jaxlab.metrics.classification import group_accuracy, group_counts
from jaxlab.metrics.outputs import Dataset, Transform, collect_outputs

_MOST_LEGIBLE = 12  # cells along a side of the matrix that still have room for a figure; classes in a picture
_INK, _OUTLINE, _EMPTY = "#3b4252", "#d55e00", "#e5e9f0"


def summarize_group_accuracy(
    acc: jax.Array, aligned_attr: jax.Array, counts: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Summarises `group_accuracy`; cells without examples (NaN) are left out of every figure.

    Args:
      acc: [C, A], the accuracy of each class with each attribute.
      aligned_attr: [C] integers, the attribute that goes with each class.
      counts: [C, A], the number of examples of each cell; if not given, that of all cells that are not
        empty is taken as equal.

    Returns:
      `unbiased`, the mean over cells, whatever their sizes; `aligned`, the mean over the cells
      [c, aligned_attr[c]]; `conflicting`, the mean over all others; `worst`, the least cell; and `micro`,
      the accuracy over examples, which without `counts` is `unbiased`. NaN where all cells are empty.
    """
    acc, aligned_attr = jnp.asarray(acc), jnp.asarray(aligned_attr)
    chex.assert_rank(acc, 2)
    chex.assert_shape(aligned_attr, acc.shape[:1])
    filled = ~jnp.isnan(acc)
    aligned = jnp.arange(acc.shape[1]) == aligned_attr[:, None]
    counts = jnp.ones_like(acc) if counts is None else jnp.asarray(counts)
    chex.assert_equal_shape([acc, counts])
    return {
        "unbiased": jnp.nanmean(acc),
        "aligned": jnp.mean(acc, where=filled & aligned),
        "conflicting": jnp.mean(acc, where=filled & ~aligned),
        "worst": jnp.nanmin(acc),
        "micro": jnp.sum(acc * counts, where=filled) / jnp.sum(counts, where=filled),
    }


def aligned_attributes(dataset: Dataset, aligned_attr: tuple[int, ...] | None = None) -> np.ndarray:
    """The attribute that goes with each class.

    Args:
      dataset: columns with `label` and `attribute`.
      aligned_attr: one attribute a class; attribute c goes with class c if not given.

    Returns:
      [C] integers, C being the number of given attributes, or else the largest label plus one.

    Raises:
      UserError: no such columns, or a class without an attribute.
    """
    if not {"label", "attribute"} <= dataset.keys():
        raise UserError(f"dataset: needs columns 'label' and 'attribute'; it has {', '.join(dataset)}.")
    num_classes = int(dataset["label"].max()) + 1
    if aligned_attr is None:
        return np.arange(num_classes)
    if len(aligned_attr) < num_classes:
        raise UserError(
            f"aligned_attr: has {len(aligned_attr)} attributes, the data set {num_classes} classes; give one"
            " for each class."
        )
    return np.asarray(aligned_attr)


def groups(
    dataset: Dataset,
    *,
    aligned_attr: tuple[int, ...] | None = None,
    batch_size: int = 512,
    transforms: tuple[Transform, ...] = (),
    images: int = 3,
) -> Evaluator:
    """Accuracy of each class with each attribute, its summary, and pictures of both.

    Args:
      dataset: columns with `label` and `attribute`.
      aligned_attr: the attribute that goes with each class; attribute c goes with class c if not given.
      batch_size: rows per forward pass.
      transforms: the deterministic transforms of evaluation; the pictures are of what comes before them.
      images: bias-conflicting examples of each class to show under an aligned one; 0: no such picture.

    Returns:
      An evaluator of `unbiased_accuracy`, `aligned_accuracy`, `conflicting_accuracy`,
      `worst_group_accuracy` and, over examples, `accuracy`, see `summarize_group_accuracy`; `empty_groups`,
      how many; and the curve `group_accuracy`, the matrix row by row (NaN in empty groups). Its plots are
      `accuracy`, the matrix, and `examples`, images of up to 12 classes, where the data set has images.

    Raises:
      UserError: the data set has no such columns, or a class has no aligned attribute.
    """
    aligned = aligned_attributes(dataset, aligned_attr)
    shape = len(aligned), max(int(dataset["attribute"].max()), int(aligned.max())) + 1

    @jax.jit
    def measure(logits: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        labels, attributes = jnp.asarray(dataset["label"]), jnp.asarray(dataset["attribute"])
        accuracy = group_accuracy(jnp.argmax(logits, axis=-1), labels, attributes, *shape)
        counts = group_counts(labels, attributes, *shape)
        return accuracy, summarize_group_accuracy(accuracy, aligned, counts)

    def evaluate(predict: Callable[[State, Batch], Outputs], state: State) -> dict[str, Any]:
        outputs = collect_outputs(predict, state, dataset, batch_size=batch_size, transforms=transforms)
        accuracy, summary = jax.device_get(measure(outputs["logits"]))
        return {
            "unbiased_accuracy": summary["unbiased"].item(),
            "aligned_accuracy": summary["aligned"].item(),
            "conflicting_accuracy": summary["conflicting"].item(),
            "worst_group_accuracy": summary["worst"].item(),
            "accuracy": summary["micro"].item(),
            "empty_groups": int(np.isnan(accuracy).sum()),
            "group_accuracy": accuracy.ravel(),
        }

    def plot(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
        figures = {"accuracy": _plot_accuracy(results, aligned, shape)}
        image = dataset.get("image")
        if images > 0 and np.ndim(image) == 4 and image.shape[-1] in (1, 3):
            figures["examples"] = _plot_examples(dataset, aligned, images)
        return figures

    return Evaluator(evaluate, plot)


def _plot_accuracy(
    results: Mapping[str, Mapping[str, Any]], aligned: np.ndarray, shape: tuple[int, int]
) -> Figure:
    """The matrix, mean over seeds; empty groups are blank, aligned ones outlined."""
    accuracy = np.asarray(results["group_accuracy"]["mean"]).reshape(shape)
    figure = Figure(figsize=(5.6, 5.2 if shape[0] >= shape[1] / 2 else 3.6), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(accuracy, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_facecolor(_EMPTY)
    for label, attribute in enumerate(aligned):
        axes.add_patch(
            Rectangle((attribute - 0.46, label - 0.46), 0.92, 0.92, fill=False, color=_OUTLINE, linewidth=1.8)
        )
    if max(shape) <= _MOST_LEGIBLE:
        for (label, attribute), value in np.ndenumerate(accuracy):
            text = "–" if np.isnan(value) else f"{100 * value:.0f}"
            colour = "white" if value > 0.6 else _INK
            axes.text(attribute, label, text, ha="center", va="center", color=colour, fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(_MOST_LEGIBLE, integer=True, steps=[1, 2, 5, 10]))
    axes.set(xlabel="attribute", ylabel="class", xlim=(-0.5, shape[1] - 0.5), ylim=(shape[0] - 0.5, -0.5))
    axes.tick_params(labelsize=9, length=0)
    axes.spines[:].set_visible(False)
    summary = [
        f"{name} {_percent(results[f'{name}_accuracy'])}" for name in ("unbiased", "aligned", "conflicting")
    ]
    axes.set_title("   ".join(summary), fontsize=9, color=_INK)
    bar = figure.colorbar(picture, ax=axes, format=PercentFormatter(1), fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0)
    bar.set_label("accuracy (outlined: bias-aligned)", fontsize=9)
    return figure


def _plot_examples(dataset: Dataset, aligned: np.ndarray, images: int) -> Figure:
    """A column a class: its first aligned example above conflicting ones, spread over the attributes."""
    label, attribute = np.asarray(dataset["label"]), np.asarray(dataset["attribute"])
    classes = np.unique(label)[:_MOST_LEGIBLE]
    low, high = min(dataset["image"].min(), 0), dataset["image"].max()
    side = np.clip(7.2 / len(classes), 0.7, 1.4)
    width, height = 0.5 + side * len(classes), 0.4 + (side + 0.2) * (1 + images)
    figure = Figure(figsize=(max(width, 4.2), height), layout="constrained")  # a page scales it to its column
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    panels = figure.subplots(1 + images, len(classes), squeeze=False)

    def show(axes: Axes, row: int) -> None:
        pixels = (dataset["image"][row].astype(np.float32) - low) / max(high - low, 1e-8)
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)  # one channel is drawn as grey, three as they are
        axes.set_title(f"y={label[row]}, a={attribute[row]}", fontsize=7.5, color=_INK, pad=2)

    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for column, c in zip(panels.T, classes):
        is_aligned = attribute == aligned[c]
        for row in np.flatnonzero((label == c) & is_aligned)[:1]:
            show(column[0], row)
        conflicting = np.flatnonzero((label == c) & ~is_aligned)
        conflicting = conflicting[np.argsort(attribute[conflicting], kind="stable")]
        for axes, part in zip(column[1:], np.array_split(conflicting, images)):
            for row in part[:1]:
                show(axes, row)
    for axes in panels.flat:
        if not axes.images:
            axes.text(0.5, 0.5, "none", ha="center", va="center", fontsize=7.5, color=_INK)
    panels[0, 0].set_ylabel("aligned", fontsize=9, color=_INK)
    for axes in panels[1:, 0]:
        axes.set_ylabel("conflicting", fontsize=9, color=_INK)
    figure.suptitle("label y, attribute a", fontsize=9, color=_INK)
    return figure


def _percent(result: Mapping[str, Any]) -> str:
    if np.isnan(result["mean"]):
        return "–"
    spread = "" if np.isnan(result["stderr"]) else f" ± {100 * result['stderr']:.1f}"
    return f"{100 * result['mean']:.1f}{spread} %"
