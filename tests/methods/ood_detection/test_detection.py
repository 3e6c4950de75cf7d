import io
from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxlab.core import UserError, build
from jaxlab.core.statistics import mean_and_stderr
from jaxlab.methods.ood_detection.detection import detection
from jaxlab.methods.ood_detection.energy import energy, max_logit
from jaxlab.methods.ood_detection.scores import knn, odin, react, search
from jaxlab.metrics.detection import fpr_at_recall, ood_metrics, roc_curve


def _columns(size: int, scale: float, seed: int) -> dict[str, np.ndarray]:
    """Inputs whose first class stands out by `scale`: the more it does, the more in distribution."""
    image = np.random.default_rng(seed).normal(size=(size, 5)).astype(np.float32)
    image[:, 0] += scale
    return {"image": image, "label": np.zeros(size, np.int32)}


ID = _columns(203, 4.0, 0)
OOD = {"near": _columns(110, 2.0, 1), "far": _columns(90, 0.0, 2)}


@jax.jit
def predict(state, batch):
    return {"logits": state * batch["image"]}


def negative_sum(logits):
    return -logits.sum(-1)


def numpy_energy(logits):
    return -np.log(np.exp(logits).sum(-1))


def test_metrics_are_those_of_each_score_and_their_mean_over_sets():
    evaluator = detection(ID, OOD, scores=("energy", negative_sum), batch_size=64, rule="at_least")
    metrics = evaluator.evaluate(predict, 1.5)
    for name, score in (("energy", numpy_energy), ("negative_sum", negative_sum)):
        rows = {
            ood: ood_metrics(score(1.5 * ID["image"]), score(1.5 * columns["image"]), rule="at_least")
            for ood, columns in OOD.items()
        }
        for metric in ("fpr95", "auroc", "aupr"):
            for ood in OOD:
                np.testing.assert_allclose(metrics[f"{name}/{ood}/{metric}"], rows[ood][metric], atol=1e-6)
            mean = (rows["near"][metric] + rows["far"][metric]) / 2
            np.testing.assert_allclose(metrics[f"{name}/mean/{metric}"], mean, atol=1e-6)
    assert metrics["energy/far/auroc"] > metrics["energy/near/auroc"] > 0.7


def test_each_data_set_passes_the_network_once_whatever_the_scores():
    calls = []

    def counting(state, batch):
        calls.append(len(batch["image"]))
        return predict(state, batch)

    detection(ID, OOD, scores=("max_logit", negative_sum), batch_size=110).evaluate(counting, 1.0)
    assert calls == [110, 110, 110, 90]


def test_transforms_reach_every_data_set():
    def double(batch, key):
        return {**batch, "image": 2 * batch["image"]}

    doubled = detection(ID, OOD, scores=("energy",), transforms=(double,)).evaluate(predict, 1.0)
    plain = detection(ID, OOD, scores=("energy",)).evaluate(predict, 2.0)
    assert doubled["energy/near/auroc"] == plain["energy/near/auroc"]
    np.testing.assert_array_equal(doubled["histogram/energy/edges"], plain["histogram/energy/edges"])


def test_curves_have_a_fixed_length_and_the_histograms_lose_no_example():
    def infinite_here_and_there(logits):
        return energy(logits).at[0].set(np.inf).at[1].set(-np.inf)

    metrics = detection(ID, OOD, scores=(infinite_here_and_there,)).evaluate(predict, 1.0)
    edges = metrics["histogram/infinite_here_and_there/edges"]
    assert np.isfinite(edges).all()
    assert (np.diff(edges) > 0).all()
    for name in ("id", "near", "far"):
        fractions = metrics[f"histogram/infinite_here_and_there/{name}"]
        assert fractions.shape == (len(edges) - 1,)
        np.testing.assert_allclose(fractions.sum(), 1)


def test_equal_scores_are_drawn_and_count_as_chance():
    def constant(logits):
        return 0 * logits[:, 0]

    evaluator = detection(ID, OOD, scores=(constant,))
    metrics = evaluator.evaluate(predict, 1.0)
    assert metrics["constant/mean/auroc"] == 0.5
    np.testing.assert_allclose(metrics["roc/constant/near"], np.linspace(0, 1, 101))
    assert set(evaluator.plot(_over_seeds([metrics]))) == {"histogram_constant", "roc", "auroc"}


@pytest.mark.parametrize("positive", ["id", "ood"])
def test_roc_curves_are_those_of_the_positive_class(positive):
    metrics = detection(ID, OOD, scores=("max_logit",), positive=positive).evaluate(predict, 1.0)
    id_scores, ood_scores = max_logit(ID["image"]), max_logit(OOD["near"]["image"])
    pair = (-id_scores, -ood_scores) if positive == "id" else (ood_scores, id_scores)
    tpr = metrics["roc/max_logit/near"]
    assert tpr.shape == (101,)
    exact_fpr, exact_tpr = roc_curve(*pair)
    np.testing.assert_allclose(tpr[30], exact_tpr[exact_fpr <= 0.3].max(), atol=0.01)
    fpr95 = metrics["max_logit/near/fpr95"]
    assert fpr95 == fpr_at_recall(*pair)
    np.testing.assert_allclose(np.interp(fpr95, np.linspace(0, 1, 101), tpr), 0.95, atol=0.02)


def test_draws_move_aupr_towards_the_positive_class_and_are_the_same_at_every_evaluation():
    full = detection(ID, OOD, scores=("energy",)).evaluate(predict, 1.0)
    few = detection(ID, OOD, scores=("energy",), n_ood=20, draws=20).evaluate(predict, 1.0)
    again = detection(ID, OOD, scores=("energy",), n_ood=20, draws=20).evaluate(predict, 1.0)
    assert few["energy/near/aupr"] > full["energy/near/aupr"] + 0.02
    np.testing.assert_allclose(few["energy/near/auroc"], full["energy/near/auroc"], atol=0.05)
    assert {k: v for k, v in few.items() if np.ndim(v) == 0} == {
        k: v for k, v in again.items() if np.ndim(v) == 0
    }
    assert set(few) == set(full)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": ("enrgy",)}, "scores: no 'enrgy'. Did you mean 'energy'"),
        ({"scores": ("energy", energy)}, "scores: one name comes twice: energy, energy"),
        ({"ood": {}}, "ood: expected data sets by name"),
        ({"ood": {"mean": OOD["near"]}}, "ood: expected data sets by name"),
    ],
)
def test_bad_input_is_named_before_anything_runs(arguments, message):
    with pytest.raises(UserError, match=message):
        detection(**({"dataset": ID, "ood": OOD} | arguments))


class State(NamedTuple):
    variables: dict


HEAD = {"kernel": np.eye(5, dtype=np.float32), "bias": np.zeros(5, np.float32)}
STATE = State({"params": {"head": HEAD}})
TRAIN = _columns(300, 4.0, 3)


@jax.jit
def predict_features(state, batch):
    features = jax.nn.relu(batch["image"])
    head = state.variables["params"]["head"]
    return {"features": features, "logits": features @ head["kernel"] + head["bias"]}


def test_fitted_scores_see_the_training_set_and_those_that_move_inputs_their_own_pass():
    chosen = {"nearest": knn(k=5), "moved": odin(temperature=10.0, epsilon=0.5), "clipped": react()}
    metrics = detection(ID, OOD, scores=chosen, train=TRAIN, batch_size=64).evaluate(predict_features, STATE)
    outputs = {
        name: jax.device_get(predict_features(STATE, columns))
        for name, columns in {"train": TRAIN, "id": ID, **OOD}.items()
    }
    head = HEAD["kernel"], HEAD["bias"]
    for name in ("nearest", "clipped"):
        params = jax.jit(chosen[name].fit)(outputs["train"], TRAIN["label"], head)
        score = jax.jit(chosen[name].score)
        values = {ood: score(params, outputs[ood], head) for ood in ("id", *OOD)}
        for ood in OOD:
            expected = ood_metrics(values["id"], values[ood])["auroc"]
            np.testing.assert_allclose(metrics[f"{name}/{ood}/auroc"], expected, atol=1e-6)

    def of_images(images):
        return predict_features(STATE, {"image": images})

    @jax.jit
    def odin_score(images):
        return chosen["moved"].score(None, of_images(chosen["moved"].perturb(of_images, images)), head)

    odds = {name: odin_score(columns["image"]) for name, columns in {"id": ID, **OOD}.items()}
    expected = ood_metrics(odds["id"], odds["far"])["auroc"]
    np.testing.assert_allclose(metrics["moved/far/auroc"], expected, atol=1e-6)
    with pytest.raises(UserError, match="train: 'nearest' is fitted"):
        detection(ID, OOD, scores=chosen)


def test_the_threshold_keeps_the_share_of_in_distribution_examples():
    for tpr in (0.5, 0.95):
        metrics = detection(ID, OOD, scores=("energy",), tpr=tpr).evaluate(predict, 1.0)
        (threshold,) = metrics["threshold/energy"]
        kept = np.mean(np.asarray(energy(ID["image"])) <= threshold)
        assert tpr <= kept < tpr + 0.01


def test_a_search_takes_what_does_best_on_the_validation_outliers_alone():
    section = {"name": "ood_detection.detection", "scores": {"shaped": {"name": "search", "score": "react"}}}
    section["scores"]["shaped"]["grid"] = {"percentile": [5.0, 50.0, 99.0]}
    validation = {"validation": _columns(150, 4.0, 4), "validation_ood": {"v": _columns(120, 1.0, 5)}}
    evaluator = build("evaluator", section, dataset=ID, ood=OOD, train=TRAIN, **validation)
    metrics = evaluator.evaluate(predict_features, STATE)
    rates = []
    for percentile in (5.0, 50.0, 99.0):
        one = detection(
            validation["validation"],
            validation["validation_ood"],
            scores=(react(percentile=percentile),),
            train=TRAIN,
        )
        rates.append(one.evaluate(predict_features, STATE)["react/mean/fpr95"])
    assert len(set(rates)) > 1
    (chosen,) = metrics["chosen/shaped"]
    assert chosen == np.argmin(rates)
    best = react(percentile=(5.0, 50.0, 99.0)[chosen])
    alone = detection(ID, OOD, scores=(best,), train=TRAIN).evaluate(predict_features, STATE)
    assert metrics["shaped/far/fpr95"] == alone["react/far/fpr95"]
    with pytest.raises(UserError, match="'react' searches; give 'validation'"):
        detection(ID, OOD, scores=(search(score="react", grid={"percentile": (5.0, 50.0)}),), train=TRAIN)


def _over_seeds(seeds: list[dict]) -> dict[str, dict]:
    results = {}
    for name in seeds[0]:
        values = [seed[name] for seed in seeds]
        mean, stderr = mean_and_stderr(values)
        results[name] = {"mean": mean, "stderr": stderr, "values": values}
    return results


def test_figures_have_a_panel_per_set_and_show_the_average_over_seeds():
    section = {"name": "ood_detection.detection", "scores": ("energy", "max_logit")}
    evaluator = build("evaluator", section, dataset=ID, ood=OOD)
    results = _over_seeds([evaluator.evaluate(predict, scale) for scale in (0.8, 1.0, 1.2)])
    figures = evaluator.plot(results)
    heat_map = figures.pop("auroc").axes[0]
    assert [label.get_text() for label in heat_map.get_yticklabels()] == ["energy", "max logit"]
    assert [label.get_text() for label in heat_map.get_xticklabels()] == ["near", "far", "mean"]
    assert set(figures) == {"histogram_energy", "histogram_max_logit", "roc"}
    for figure in figures.values():
        assert [axes.get_title("left") for axes in figure.axes] == ["near", "far"]
        figure.savefig(io.BytesIO(), format="png", dpi=40)
    stairs = figures["histogram_energy"].axes[1].patches[0]
    assert stairs.get_label() == "in distribution"
    np.testing.assert_allclose(stairs.get_data().values.sum(), 1)
    line = figures["roc"].axes[0].lines[1]  # after the diagonal
    np.testing.assert_allclose(line.get_ydata(), results["roc/energy/near"]["mean"])
    assert f"{results['energy/near/auroc']['mean']:.3f} ±" in line.get_label()
