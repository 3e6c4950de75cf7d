"""Methods of debiasing through the command line: memories and what is handed over survive stops and devices."""

import json
import signal

import jax
import numpy as np
import pytest

from jaxlab import experiment
from jaxlab.data import store
from jaxlab.data.coloring import colored_digits
from jaxlab.data.transforms import standardize
from jaxlab.methods.debiasing.jtt import error_weights
from jaxlab.metrics.classification import negative_log_likelihood
from launch import evaluate, report
from tests.launch import runs

SMALL = [
    f"--config.{key}"
    for key in ("seeds=2", "network.hidden=[8]", "log_every=10", "checkpoint_every=10", "devices.data=1")
]


@pytest.fixture(scope="module", autouse=True)
def data_dir(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tensorflow_datasets")))
        yield


def train(method, workdir, *overrides):
    config = runs.ROOT / "configs" / "debiasing" / "colored_digits.py"
    keys = [f"--config.{key}" for key in overrides]
    return runs.run(f"{config}:cpu,{method}", workdir, *SMALL, *keys)


def assert_same_run(a, b):
    for file in ("metrics.jsonl", "result.json"):
        assert (a / file).read_text() == (b / file).read_text()
    jax.tree.map(np.testing.assert_array_equal, runs.final_state(a), runs.final_state(b))


@pytest.fixture(scope="module")
def failure(tmp_path_factory):
    """A run of learning from failure that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("failure") / "run"
    assert train("lff", workdir, "stages.lff.steps=40") == 0
    return workdir


def test_learning_from_failure_goes_on_to_the_same_bits_with_its_memory(failure, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        runs.stop_at(patch, 10)
        stopped = train("lff", tmp_path, "stages.lff.steps=40", "steps_per_call=3")
    assert stopped == 128 + signal.SIGTERM
    step = json.loads(runs.result(tmp_path / "lff"))["step"]
    assert 10 < step < 20
    seen = runs.final_state(tmp_path / "lff").memory.seen
    assert 0 < seen.sum() <= 2 * 64 * step
    assert train("lff", tmp_path, "stages.lff.steps=40") == 0
    assert_same_run(tmp_path / "lff", failure / "lff")
    state = runs.final_state(tmp_path / "lff")
    assert state.memory.seen.all()  # 19 steps an epoch
    assert state.biased_memory.value.min() > 0


FOUR_SEEDS = ("seeds=4", "stages.lff.steps=20", "stages.lff.evaluators={}")


@pytest.fixture(scope="module")
def single_device(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("single_device") / "run"
    assert train("lff", workdir, *FOUR_SEEDS) == 0
    return runs.final_state(workdir / "lff")


@pytest.mark.parametrize("mesh", [(4, 2), (1, 8)], ids=str)
def test_learning_from_failure_on_many_devices_equals_one(mesh, single_device, tmp_path):
    devices = (f"devices.seed={mesh[0]}", f"devices.data={mesh[1]}")
    assert train("lff", tmp_path, *FOUR_SEEDS, *devices) == 0
    state = runs.final_state(tmp_path / "lff")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), state, single_device)
    assert state.memory.seen.all()
    assert np.ptp(state.memory.value, axis=0).max() > 0.1  # each seed has its own


def test_a_run_of_learning_from_failure_can_be_evaluated_and_reported(failure, tmp_path):
    evals = json.loads(runs.result(failure))["evals"]
    assert {name.split("/")[1] for name in evals} == {"test", "biased", "difficulty"}
    assert evals["lff/difficulty/seen"]["values"] == [1, 1]
    assert evaluate.main(["--workdir", str(failure), "--out", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["evals"] == evals
    assert report.main([str(failure), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    for plot in ("test_accuracy", "test_examples", "biased_accuracy", "difficulty_histogram"):
        assert (failure / "lff" / "plots" / f"{plot}.png").stat().st_size > 1000
        assert f'alt="{plot.replace("_", " ")}"' in page
    assert (tmp_path / "report" / "plots" / "lff_train_weight.png").is_file()


def outputs_of_all(workdir, dataset):
    """What the final network of a stage says about each training example, [seeds, N, ...]."""
    run = experiment.load(workdir)
    return run.predict(run.state, standardize(scale=255.0)(dataset, None))


@pytest.mark.parametrize(
    ("method", "first", "overrides"),
    [
        ("jtt", "identification", ("jtt.method.identification_network.hidden=[8]",)),
        pytest.param(
            "two_stage", "biased", ("two_stage.method.biased_network.hidden=[8]",), marks=pytest.mark.slow
        ),
        pytest.param(
            "bias_ensemble",
            "ensemble",
            (
                "ensemble.network.network.hidden=[8]",
                "ensemble.optimizer.learning_rate=0.03",
                "bias_ensemble.method.ensemble_network.network.hidden=[8]",
                "bias_ensemble.method.threshold=0.5",
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["jtt", "two_stage", "bias_ensemble"],
)
def test_a_second_stage_goes_on_to_the_same_bits_with_what_the_first_handed_over(
    method, first, overrides, tmp_path, monkeypatch
):
    overrides += (f"{first}.steps=20", f"{first}.evaluators={{}}")
    overrides += (f"{method}.steps=40", f"{method}.evaluators={{}}")
    overrides = [f"stages.{override}" for override in overrides]
    with monkeypatch.context() as patch:
        runs.stop_at(patch, 30)
        stopped = train(method, tmp_path / "stopped", *overrides, f"stages.{method}.steps_per_call=3")
    assert stopped == 128 + signal.SIGTERM
    assert json.loads(runs.result(tmp_path / "stopped" / first))["status"] == "complete"
    assert json.loads(runs.result(tmp_path / "stopped" / method))["step"] == 33
    assert train(method, tmp_path / "stopped", *overrides) == 0
    assert train(method, tmp_path / "undisturbed", *overrides) == 0
    assert_same_run(tmp_path / "stopped" / first, tmp_path / "undisturbed" / first)
    assert_same_run(tmp_path / "stopped" / method, tmp_path / "undisturbed" / method)

    state = runs.final_state(tmp_path / "stopped" / method)
    digits = store.arrays("digits", "train")
    dataset = colored_digits(digits, aligned_ratio=0.95, std=0.005, maximum=16)
    outputs = outputs_of_all(tmp_path / "stopped" / first, dataset)
    if method == "jtt":
        wrong = np.argmax(outputs["logits"], -1) != dataset["label"]
        kept, expected = state.weights, jax.vmap(lambda w: error_weights(w, 20.0))(wrong)
        np.testing.assert_allclose(kept, expected, rtol=1e-6)
    elif method == "two_stage":
        handed_over = runs.final_state(tmp_path / "stopped" / first).variables
        jax.tree.map(np.testing.assert_array_equal, state.biased_variables, handed_over)
        kept = jax.vmap(negative_log_likelihood, (0, None))(outputs["logits"], dataset["label"])
        np.testing.assert_allclose(state.biased_memory.value, kept, rtol=1e-4, atol=1e-5)
    else:
        probabilities = jax.nn.softmax(outputs["member_logits"])
        sure = probabilities[:, np.arange(1200), :, dataset["label"]] > 0.5  # [N, seeds, M]
        kept, expected = state.selected, np.sum(sure, -1).T >= 3
        np.testing.assert_array_equal(kept, expected)
    assert np.any(kept[0] != kept[1])  # each seed's own
    assert np.all(np.ptp(kept.astype(np.float32), axis=1) > 0)
