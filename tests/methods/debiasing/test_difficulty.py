from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from jaxlab.core import UserError, build
from jaxlab.core.statistics import mean_and_stderr
from jaxlab.methods.debiasing.difficulty import biased_network, difficulty
from jaxlab.methods.debiasing.lff import LossMemory, lff
from jaxlab.metrics.groups import groups
from jaxlab.nn.mlp import mlp


class Memories(NamedTuple):
    memory: LossMemory
    biased_memory: LossMemory


class Plain(NamedTuple):
    variables: dict


def _dataset(size=300, classes=3, attributes=4, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "label": rng.integers(0, classes, size).astype(np.int32),
        "attribute": rng.integers(0, attributes, size).astype(np.int32),
    }


def _state(size=300, seed=1, unseen=0):
    """The biased losses have ties, and weights that are zero; the last `unseen` examples have no loss."""
    rng = np.random.default_rng(seed)
    seen = np.arange(size) < size - unseen
    losses = rng.uniform(0.1, 2, size), rng.integers(0, 8, size) / 4
    return Memories(*(LossMemory(jnp.float32(np.where(seen, loss, 0)), jnp.asarray(seen)) for loss in losses))


def _weights_by_loops(state, labels):
    loss_d, loss_b = (np.asarray(memory.value, np.float64) for memory in state)
    weights = []
    for i, label in enumerate(labels):
        b, d = (loss[i] / loss[labels == label].max() for loss in (loss_b, loss_d))
        weights.append(b / (b + d + 1e-8))
    return np.array(weights)


def _over_seeds(seeds):
    results = {}
    for name in seeds[0]:
        values = [np.asarray(seed[name], np.float64) for seed in seeds]
        mean, stderr = mean_and_stderr(values)
        results[name] = {"mean": mean, "stderr": stderr, "values": values}
    return results


@pytest.mark.parametrize("aligned", [None, (2, 0, 3)])
def test_metrics_equal_scikit_learn_on_weights_by_loops(aligned):
    dataset, state = _dataset(), _state(unseen=30)
    metrics = difficulty(dataset, aligned_attr=aligned).evaluate(None, state)
    conflicting = dataset["attribute"] != np.array(aligned or range(3))[dataset["label"]]
    scores = {
        "": _weights_by_loops(state, dataset["label"]),
        "biased_loss/": np.asarray(state.biased_memory.value),
    }
    assert np.sum(scores[""] == 0) > 30
    for prefix, score in scores.items():
        expected = {
            "auroc": roc_auc_score(conflicting, score),
            "average_precision": average_precision_score(conflicting, score),
            "aligned_mean": score[~conflicting].mean(),
            "conflicting_mean": score[conflicting].mean(),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[prefix + name], value, rtol=2e-5, err_msg=prefix + name)
    np.testing.assert_allclose(metrics["seen"], 0.9)


def test_weights_of_conflicting_examples_alone_are_perfect_detection():
    dataset = _dataset()
    conflicting = (dataset["attribute"] != dataset["label"]).astype(np.float32)
    seen = jnp.ones(300, bool)
    state = Memories(LossMemory(jnp.ones(300), seen), LossMemory(jnp.asarray(conflicting), seen))
    metrics = difficulty(dataset).evaluate(None, state)
    assert metrics["auroc"] == metrics["average_precision"] == metrics["biased_loss/auroc"] == 1
    assert metrics["aligned_mean"] == 0
    np.testing.assert_allclose(metrics["conflicting_mean"], 0.5, rtol=1e-6)
    np.testing.assert_array_equal(metrics["histogram/aligned"], np.eye(20)[0])


def test_before_the_first_step_detection_is_chance():
    metrics = difficulty(_dataset()).evaluate(None, _state(unseen=300))
    assert metrics["auroc"] == metrics["biased_loss/auroc"] == 0.5
    assert metrics["seen"] == 0


def test_histograms_are_the_fractions_of_each_group():
    dataset, state = _dataset(), _state()
    metrics = difficulty(dataset).evaluate(None, state)
    weights = _weights_by_loops(state, dataset["label"])
    conflicting = dataset["attribute"] != dataset["label"]
    for name, group in (("aligned", weights[~conflicting]), ("conflicting", weights[conflicting])):
        expected = np.histogram(group, 20, (0, 1))[0] / len(group)
        np.testing.assert_allclose(metrics[f"histogram/{name}"], expected, atol=1e-9)


@pytest.mark.parametrize(("shift", "missing"), [(0, "conflicting"), (1, "aligned")])
def test_a_group_without_examples_is_nan_and_can_be_drawn(shift, missing):
    dataset = _dataset()
    dataset["attribute"] = dataset["label"] + np.int32(shift)
    evaluator = difficulty(dataset)
    metrics = evaluator.evaluate(None, _state())
    nan = {name for name, value in metrics.items() if np.isnan(value).any()}
    assert nan == {
        "auroc",
        "average_precision",
        f"{missing}_mean",
        "biased_loss/auroc",
        "biased_loss/average_precision",
        f"biased_loss/{missing}_mean",
        f"histogram/{missing}",
    }
    evaluator.plot(_over_seeds([metrics, metrics]))["histogram"].canvas.draw()


def test_the_histogram_has_one_panel_and_the_auroc_over_seeds():
    evaluator = difficulty(_dataset())
    seeds = [evaluator.evaluate(None, _state(seed=seed)) for seed in (1, 2)]
    figures = evaluator.plot(_over_seeds(seeds))
    figures["histogram"].canvas.draw()
    (axes,) = figures["histogram"].axes
    mean, stderr = mean_and_stderr([seed["auroc"] for seed in seeds])
    assert axes.get_title(loc="right") == f"AUROC {mean:.3f} ± {stderr:.3f}"
    single = evaluator.plot(_over_seeds(seeds[:1]))["histogram"]
    assert "±" not in single.axes[0].get_title(loc="right")
    np.testing.assert_allclose(
        axes.patches[0].get_data().values, np.mean([seed["histogram/aligned"] for seed in seeds], axis=0)
    )


def test_evaluations_and_seeds_share_one_compilation(caplog):
    evaluator = difficulty(_dataset(size=301))

    def compiled(seed):
        state = _state(size=301, seed=seed)
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
            evaluator.evaluate(None, state)
        return [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]

    assert any("weigh" in message for message in compiled(1))
    assert not compiled(2)


def test_the_biased_network_is_evaluated_in_place_of_the_debiased_one():
    dataset = _dataset() | {"image": np.random.default_rng(2).normal(size=(300, 2, 2, 1)).astype(np.float32)}
    method = lff(mlp(num_classes=3, hidden=(8,)), optax.sgd(0.1), dataset=dataset, num_classes=3)
    state = method.init(jax.random.key(0), {**dataset, "index": np.arange(300)})
    predict = jax.jit(method.predict)
    plain = groups(dataset, batch_size=100)
    biased = biased_network(plain).evaluate(predict, state)
    swapped = state._replace(variables=state.biased_variables)
    np.testing.assert_equal(biased, plain.evaluate(predict, swapped))
    assert biased["accuracy"] != plain.evaluate(predict, state)["accuracy"]
    assert biased_network(plain).plot is plain.plot
    metrics = difficulty(dataset).evaluate(predict, state)
    assert metrics["seen"] == 0


def test_both_are_built_from_a_config():
    dataset = _dataset()
    build("evaluator", {"name": "debiasing.difficulty", "dataset": dataset, "aligned_attr": [0, 1, 2]})
    nested = {"name": "groups", "dataset": dataset}
    build("evaluator", {"name": "debiasing.difficulty.biased_network", "evaluator": nested})


def test_states_that_do_not_fit_are_named_in_one_line():
    plain = Plain({})
    with pytest.raises(UserError, match=r"^debiasing\.difficulty: .*Plain\) has no 'memory'"):
        difficulty(_dataset()).evaluate(None, plain)
    with pytest.raises(UserError, match=r"biased_network: .*Plain\) has no 'biased_variables'"):
        biased_network(groups(_dataset())).evaluate(None, plain)
    with pytest.raises(UserError, match="has 300 examples, the loss memories 200; give it the training set"):
        difficulty(_dataset()).evaluate(None, _state(size=200))
