"""The evaluators on predictors whose errors and weights are known, and their figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.core.statistics import mean_and_stderr
from jaxlab.methods.in_context import baselines, prompts
from jaxlab.methods.in_context.evaluation import (
    algorithm_distance,
    implicit_weights,
    paired_errors,
    prompt_kind,
)
from jaxlab.methods.in_context.functions import (
    linear,
    linear_classification,
    noisy_linear,
    pool_weights,
    task_pool,
)

D, K = 2, 4
LEAST_SQUARES = baselines.least_squares()


def predict(state, batch):
    """Least squares times the state, as a compiled network would stand there."""
    return {"predictions": state * LEAST_SQUARES(batch["xs"], batch["ys"])}


def over_seeds(*seeds):
    return {
        name: dict(zip(("mean", "stderr"), mean_and_stderr(values)), values=values)
        for name in seeds[0]
        for values in [[seed[name] for seed in seeds]]
    }


def kind(function=None, **keys):
    return prompt_kind(function or linear(), dimension=D, num_points=K, **keys)


@pytest.mark.parametrize(
    "shift",
    [None, prompts.skewed(), prompts.orthants(), prompts.query_is_example(), prompts.scale_query(factor=2.0)],
    ids=["standard", "skewed", "orthants", "query_is_example", "scale_query"],
)
def test_a_network_that_is_least_squares_has_its_errors_on_the_same_prompts(shift):
    evaluator = paired_errors(
        {"only": kind(shift=shift)}, baselines={"least_squares": LEAST_SQUARES}, num_prompts=70, batch_size=32
    )
    metrics = evaluator.evaluate(predict, 1.0)
    for name in ("error", "low", "high"):
        model, baseline = metrics[f"model/{name}"], metrics[f"least_squares/{name}"]
        np.testing.assert_allclose(model, baseline, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["least_squares/distance"], 0, atol=1e-8)
    assert np.all(metrics["model/low"] <= metrics["model/error"] + 1e-6)
    np.testing.assert_allclose(metrics["model/mean_error"], np.mean(metrics["model/error"]), rtol=1e-6)
    assert metrics["model/last_error"] == metrics["model/error"][-1]
    # Half of the prediction leaves a quarter of the label's square once least squares is exact.
    half = evaluator.evaluate(predict, 0.5)
    ratio = half["least_squares/distance"][-1] / half["model/error"][-1]
    np.testing.assert_allclose(ratio, 1, rtol=1e-3)


def test_errors_of_noiseless_prompts_follow_the_closed_form():
    evaluator = paired_errors({"only": prompt_kind(linear(), dimension=5, num_points=8)}, num_prompts=4000)
    metrics = evaluator.evaluate(predict, 1.0)
    np.testing.assert_allclose(metrics["model/error"], [1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0], atol=0.05)


def test_several_kinds_have_names_and_normalizers_of_their_own():
    kinds = {
        "inputs": kind(shift=prompts.scale_x(factor=3.0), normalizer=9.0 * D),
        "weights": kind(linear(scale=3.0)),
        "longer": prompt_kind(linear(), dimension=D, num_points=K + 2, trained_points=K),
    }
    metrics = paired_errors(kinds, num_prompts=600).evaluate(predict, 0.0)
    for name in kinds:
        np.testing.assert_allclose(metrics[f"model/{name}/error"], 1, atol=0.25)
    assert metrics["model/longer/error"].shape == (K + 2,)


def test_the_noise_free_target_has_the_tasks_of_the_prompts_and_not_their_noise():
    tasks = dict(num_tasks=2, seed=3)
    function = task_pool(noisy_linear(noise_std=0.1), **tasks)
    discrete = baselines.discrete_mmse(pool=pool_weights(linear(), dimension=D, **tasks), sigma=0.1)
    evaluator = paired_errors(
        {"noisy": kind(function), "free": kind(function, target=linear())}, baselines={"discrete": discrete}
    )
    metrics = evaluator.evaluate(predict, 0.0)
    # After three examples the task is known, and what is left is the noise.
    np.testing.assert_allclose(metrics["discrete/noisy/last_error"], 0.01 / (D + 0.01), rtol=0.2)
    assert metrics["discrete/free/last_error"] < 1e-3


def test_labels_of_two_signs_have_an_accuracy():
    evaluator = paired_errors({"only": kind(linear_classification())}, num_prompts=64)
    metrics = evaluator.evaluate(predict, 1.0)
    assert metrics["model/last_accuracy"] > 0.7
    assert "model/error" not in metrics
    assert list(evaluator.plot(over_seeds(metrics))) == ["accuracy"]


def test_implicit_weights_are_those_of_linear_answers_and_tell_what_is_not_linear():
    rng = np.random.default_rng(0)
    queries, weights = rng.normal(size=(9, 3)), rng.normal(size=(2, 4, 3))
    answers = np.einsum("qd,bkd->qbk", queries, weights)
    found, linearity = implicit_weights(queries, answers)
    np.testing.assert_allclose(found, weights, atol=1e-12)
    np.testing.assert_allclose(linearity, 1)
    _, linearity = implicit_weights(queries, answers**2)
    assert np.all(linearity < 0.95)


def test_a_network_that_is_an_algorithm_is_at_no_distance_from_it():
    algorithms = {"least_squares": LEAST_SQUARES, "averaging": baselines.averaging()}
    evaluator = algorithm_distance(linear(), dimension=D, num_points=K, algorithms=algorithms, num_prompts=16)
    metrics = evaluator.evaluate(jax.jit(predict), jnp.float32(1.0))
    np.testing.assert_allclose(metrics["least_squares/weight_distance"], 0, atol=1e-6)
    np.testing.assert_allclose(metrics["least_squares/gradient_cosine"], [0, 1, 1, 1], atol=1e-4)
    np.testing.assert_allclose(metrics["model/gradient_alignment"], [0, 1, 1, 1], atol=1e-4)
    np.testing.assert_allclose(metrics["model/linearity"], 1, atol=1e-5)
    assert metrics["averaging/mean_weight_distance"] > 0.1
    # A smaller answer has the same direction.
    smaller = evaluator.evaluate(jax.jit(predict), jnp.float32(0.5))
    np.testing.assert_allclose(smaller["least_squares/gradient_cosine"], [0, 1, 1, 1], atol=1e-4)
    assert smaller["least_squares/mean_weight_distance"] > 0.1
    figures = evaluator.plot(over_seeds(metrics, smaller))
    assert list(figures) == ["weight_distance", "gradient_cosine"]


def test_figures_have_a_panel_for_each_kind_and_a_line_for_each_algorithm_and_seed():
    kinds = {"standard": kind(), "longer": prompt_kind(linear(), dimension=D, num_points=6, trained_points=K)}
    evaluator = paired_errors(kinds, baselines={"least_squares": LEAST_SQUARES}, num_prompts=32)
    results = over_seeds(*(evaluator.evaluate(predict, scale) for scale in (1.0, 0.5)))
    figures = evaluator.plot(results)
    assert list(figures) == ["error", "distance"]
    for figure in figures.values():
        figure.canvas.draw()
        assert [ax.get_title(loc="left") for ax in figure.axes] == list(kinds)
    standard, longer = figures["error"].axes
    (network,) = [line for line in standard.lines if line.get_label() == "network"]
    np.testing.assert_allclose(network.get_ydata(), results["model/standard/error"]["mean"])
    assert not standard.texts
    assert [text.get_text() for text in longer.texts] == ["untrained"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_errors({}), "prompts: "),
        (lambda: paired_errors({"a": kind()}, num_prompts=0), "num_prompts: "),
        (lambda: paired_errors({"a": kind()}, baselines={"model": LEAST_SQUARES}), "baselines: 'model'"),
        (lambda: paired_errors({"a": kind(), "b": kind(linear_classification())}), "prompts: some"),
        (lambda: prompt_kind(linear(), dimension=0, num_points=3), "dimension: "),
        (
            lambda: algorithm_distance(linear(), dimension=3, num_points=3, algorithms={}, num_queries=3),
            "num_queries: ",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(call, message):
    with pytest.raises(UserError, match=f"^{message}"):
        call()
