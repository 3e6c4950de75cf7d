import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError, build
from jaxlab.core.statistics import mean_and_stderr
from jaxlab.metrics.groups import aligned_attributes, groups, summarize_group_accuracy

SUMMARIZE = jax.jit(summarize_group_accuracy)


@jax.jit
def predict(state, batch):
    return {"logits": state * batch["logits"]}


def _dataset(size=230, classes=3, attributes=4, seed=0, **columns) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "logits": rng.normal(size=(size, classes)).astype(np.float32),
        "label": rng.integers(0, classes, size).astype(np.int32),
        "attribute": rng.integers(0, attributes, size).astype(np.int32),
        **columns,
    }


def _select(dataset, keep):
    return {name: column[keep] for name, column in dataset.items()}


def _by_loops(dataset, aligned, num_attributes):
    """Everything `groups` measures, by loops over cells."""
    hit = dataset["logits"].argmax(-1) == dataset["label"]
    cells, of_aligned, of_conflicting = [], [], []
    for c, aligned_attribute in enumerate(aligned):
        for a in range(num_attributes):
            rows = (dataset["label"] == c) & (dataset["attribute"] == a)
            cells.append(hit[rows].mean() if rows.any() else np.nan)
            if rows.any():
                (of_aligned if a == aligned_attribute else of_conflicting).append(cells[-1])
    return {
        "unbiased_accuracy": np.mean(of_aligned + of_conflicting),
        "aligned_accuracy": np.mean(of_aligned) if of_aligned else np.nan,
        "conflicting_accuracy": np.mean(of_conflicting) if of_conflicting else np.nan,
        "worst_group_accuracy": min(of_aligned + of_conflicting),
        "accuracy": hit.mean(),
        "empty_groups": np.isnan(cells).sum(),
        "group_accuracy": cells,
    }


def _over_seeds(seeds):
    results = {}
    for name in seeds[0]:
        values = [np.asarray(seed[name], np.float64) for seed in seeds]
        mean, stderr = mean_and_stderr(values)
        results[name] = {"mean": mean, "stderr": stderr, "values": values}
    return results


def test_a_hand_made_matrix_is_summarised():
    accuracy = np.float32([[0.9, 0.1, np.nan], [0.3, np.nan, 0.7]])
    counts = np.array([[90, 10, 0], [10, 0, 40]])
    summary = SUMMARIZE(accuracy, np.array([0, 2]), counts)
    expected = {"unbiased": 0.5, "aligned": 0.8, "conflicting": 0.2, "worst": 0.1, "micro": 113 / 150}
    assert set(summary) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(summary[name], value, rtol=1e-6)
    without_counts = SUMMARIZE(accuracy, np.array([0, 2]))
    np.testing.assert_allclose(without_counts["micro"], 0.5, rtol=1e-6)


def test_of_ten_classes_and_attributes_the_unbiased_figure_is_a_tenth_aligned():
    accuracy = np.random.default_rng(0).uniform(size=(10, 10)).astype(np.float32)
    summary = SUMMARIZE(accuracy, jnp.arange(10))
    np.testing.assert_allclose(summary["aligned"], np.diag(accuracy).mean(), rtol=1e-6)
    mixed = 0.1 * summary["aligned"] + 0.9 * summary["conflicting"]
    np.testing.assert_allclose(summary["unbiased"], mixed, rtol=1e-6)


def test_only_what_needs_a_missing_group_is_nan():
    conflicting_only = SUMMARIZE(np.float32([[np.nan, 0.5], [1.0, np.nan]]), np.array([0, 1]))
    assert np.isnan(conflicting_only.pop("aligned"))
    assert all(np.isfinite(value) for value in conflicting_only.values())
    nothing = SUMMARIZE(np.full((2, 2), np.nan, np.float32), np.array([0, 1]), np.zeros((2, 2), int))
    assert all(np.isnan(value) for value in nothing.values())


def test_counts_of_another_shape_are_refused():
    with pytest.raises(AssertionError):
        summarize_group_accuracy(np.ones((2, 3)), np.array([0, 1]), np.ones((3, 2)))
    with pytest.raises(AssertionError):
        summarize_group_accuracy(np.ones((2, 3)), np.array([0, 1, 2]))


@pytest.mark.parametrize("aligned", [None, (2, 0, 1), (3, 3, 0), (0, 1, 6)])
def test_the_evaluator_equals_loops_for_any_aligned_map(aligned):
    dataset = _dataset()
    dataset = _select(dataset, (dataset["label"] != 1) | (dataset["attribute"] != 3))
    num_attributes = 4 if aligned is None else max(4, max(aligned) + 1)
    metrics = groups(dataset, aligned_attr=aligned, batch_size=64).evaluate(predict, 2.0)
    expected = _by_loops(dataset, aligned or range(3), num_attributes)
    assert list(metrics) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


def test_a_set_of_conflicting_examples_alone_is_measured_and_drawn():
    dataset = _dataset(classes=2, attributes=2, image=np.ones((230, 4, 4, 3), np.uint8))
    dataset = _select(dataset, dataset["label"] != dataset["attribute"])
    evaluator = groups(dataset)
    metrics = evaluator.evaluate(predict, 1.0)
    assert np.isnan(metrics["aligned_accuracy"])
    assert metrics["empty_groups"] == 2
    assert metrics["unbiased_accuracy"] == metrics["conflicting_accuracy"]
    figures = evaluator.plot(_over_seeds([metrics, metrics]))
    assert "aligned –" in figures["accuracy"].axes[0].get_title()
    texts = [axes.texts[0].get_text() for axes in figures["examples"].axes[:2]]
    assert texts == ["none", "none"]
    for figure in figures.values():
        figure.canvas.draw()


def test_evaluations_and_seeds_share_one_compilation(caplog):
    evaluator = groups(_dataset(size=231))

    def compiled(scale):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
            evaluator.evaluate(predict, scale)
        return [record for record in caplog.records if "Compiling" in record.getMessage()]

    assert compiled(1.0)
    assert not compiled(2.0)
    assert not compiled(3.0)


def test_the_matrix_is_drawn_as_the_mean_over_seeds_with_its_aligned_cells_outlined():
    dataset = _dataset()
    evaluator = groups(dataset, aligned_attr=(2, 0, 1))
    seeds = [evaluator.evaluate(predict, scale) for scale in (1.0, -1.0)]
    figure = evaluator.plot(_over_seeds(seeds))["accuracy"]
    figure.canvas.draw()
    axes, _ = figure.axes  # the matrix and its colour bar
    mean = np.mean([seed["group_accuracy"] for seed in seeds], axis=0)
    np.testing.assert_allclose(axes.images[0].get_array().ravel(), mean, rtol=1e-6)
    assert [text.get_text() for text in axes.texts] == [f"{100 * value:.0f}" for value in mean]
    outlined = [(round(p.get_x() + 0.46), round(p.get_y() + 0.46)) for p in axes.patches]
    assert outlined == [(2, 0), (0, 1), (1, 2)]


def test_cells_too_small_for_figures_have_none():
    dataset = _dataset(classes=13, attributes=2)
    evaluator = groups(dataset, aligned_attr=(0,) * 13)
    figure = evaluator.plot(_over_seeds([evaluator.evaluate(predict, 1.0)]))["accuracy"]
    figure.canvas.draw()
    assert not figure.axes[0].texts


@pytest.mark.parametrize(
    ("channels", "maximum", "dtype"), [(3, 255, np.uint8), (1, 16, np.uint8), (3, 1, float)]
)
def test_examples_are_aligned_above_conflicting_and_scaled_to_the_largest_value(channels, maximum, dtype):
    dataset = _dataset()
    image = np.zeros((230, 5, 5, channels), dtype)
    image[:, 0, 0, 0] = dataset["label"] * maximum / 4  # tells which example is drawn
    image[0, 4, 4] = maximum
    dataset["image"] = image
    evaluator = groups(dataset, aligned_attr=(2, 0, 1), images=2)
    figure = evaluator.plot(_over_seeds([evaluator.evaluate(predict, 1.0)]))["examples"]
    figure.canvas.draw()
    panels = np.reshape(figure.axes, (3, 3))
    for c, aligned in enumerate((2, 0, 1)):
        for row, axes in enumerate(panels[:, c]):
            label, attribute = (int(part.split("=")[1]) for part in axes.get_title().split(", "))
            assert label == c
            assert (attribute == aligned) == (row == 0)
            pixels = np.asarray(axes.images[0].get_array())
            expected = dtype(c * maximum / 4) / maximum
            np.testing.assert_allclose(pixels[0, 0].ravel()[0], expected, rtol=1e-5)
    shown = {axes.get_title() for axes in panels[1:, 0]}
    assert len(shown) == 2  # different attributes


@pytest.mark.parametrize("images", [0, 2])
def test_without_images_or_wish_for_them_only_the_matrix_is_drawn(images):
    columns = {} if images else {"image": np.ones((230, 4, 4, 1), np.uint8)}
    evaluator = groups(_dataset(**columns), images=images)
    assert set(evaluator.plot(_over_seeds([evaluator.evaluate(predict, 1.0)]))) == {"accuracy"}


def test_the_aligned_attribute_is_the_class_unless_given():
    dataset = _dataset()
    np.testing.assert_array_equal(aligned_attributes(dataset), [0, 1, 2])
    np.testing.assert_array_equal(aligned_attributes(dataset, (1, 1, 0, 0)), [1, 1, 0, 0])


@pytest.mark.parametrize(
    ("section", "columns", "message"),
    [
        ({}, ("logits", "label"), r"^config\.test: dataset: needs .* 'attribute'; it has logits, label\.$"),
        ({"aligned_attr": [0, 1]}, None, r"^config\.test: aligned_attr: has 2 attributes, .* 3 classes"),
    ],
)
def test_bad_input_ends_in_one_line(section, columns, message):
    dataset = _dataset()
    dataset = {name: dataset[name] for name in columns or dataset}
    with pytest.raises(UserError, match=message):
        build("evaluator", {"name": "groups", "dataset": dataset, **section}, "config.test")
