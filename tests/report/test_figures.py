import numpy as np
import pytest

from jaxlab.report.figures import draw_curves, panels
from jaxlab.report.runs import Curve, read_runs

STEPS = np.array([1, 2, 3])


def test_the_band_is_one_standard_error_around_the_mean():
    values = np.array([[1.0, 3.0], [2.0, 4.0], [3.0, 5.0]])
    (axes,) = draw_curves("loss", {0: Curve(STEPS, values)}, ["a"]).axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [2.0, 3.0, 4.0])
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices
    for step, low, high in zip(STEPS, [1.0, 2.0, 3.0], [3.0, 4.0, 5.0]):
        at_step = heights[heights[:, 0] == step, 1]
        np.testing.assert_allclose([at_step.min(), at_step.max()], [low, high])


@pytest.mark.parametrize(
    "values", [[[1.0], [2.0], [3.0]], [[np.nan], [np.nan], [np.nan]], [[1.0], [np.inf], [2.0]]]
)
def test_one_seed_nan_and_infinity_can_be_drawn(values):
    draw_curves("loss", {0: Curve(STEPS, np.array(values))}, ["a"]).canvas.draw()


def test_names_stand_in_the_legend_whatever_they_hold():
    names = ["_hidden", "$x_", "<b>"]
    curve = Curve(STEPS, np.ones((3, 2)))
    figure = draw_curves("loss", dict.fromkeys(range(3), curve), names)
    figure.canvas.draw()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [" _hidden", r" \$x_", " <b>"]


def test_a_panel_a_metric_without_single_points_missing_values_and_inner_groups(write_run):
    metrics = {"d/accuracy": [1.0], "d/aligned": [None], "d/s/mean/auroc": [1.0], "d/s/x/auroc": [1.0]}
    history = [{"step": step, "split": "eval", **metrics} for step in (1, 2)]
    history += [{"step": 2, "split": "train", "loss": [1.0]}]
    runs = read_runs([write_run("a", history=history), write_run("b", history=history)])
    found = list(panels(runs))
    assert [panel[:3] for panel in found] == [("", "eval", "d/accuracy"), ("", "eval", "d/s/mean/auroc")]
    assert [len(panel[3].axes[0].lines) for panel in found] == [2, 2]


@pytest.mark.parametrize(("last", "scale"), [(0.5, "linear"), (0.005, "log"), (0.0, "linear")])
def test_a_metric_that_falls_by_more_than_two_decades_has_a_log_axis(last, scale):
    figure = draw_curves("loss", {0: Curve(STEPS, np.array([[1.0], [0.7], [last]]))}, ["a"])
    figure.canvas.draw()
    assert figure.axes[0].get_yscale() == scale
