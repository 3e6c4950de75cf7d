"""launch.evaluate gives the figures of a run's own evaluation and leaves no trace in its folder."""

import json
import shutil

import pytest

from jaxlab.core import UserError
from jaxlab.train import writers
from launch import evaluate
from tests.launch import runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run on eight devices; its best checkpoint, where low accuracy is good, is not its newest."""
    folder = tmp_path_factory.mktemp("finished")
    workdir = folder / "run"
    best = ["--config.eval_every=10", "--config.best_metric=test/accuracy", "--config.best_mode=min"]
    assert runs.run(runs.write_config(folder), workdir, "--config.devices.data=-1", *best) == 0
    return workdir


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("staged")
    assert runs.run(runs.write_config(folder, runs.STAGED), folder / "run") == 0
    return folder / "run"


def contents(folder):
    """Every file with its bytes and time, every folder with its time."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


def evaluated(workdir, tmp_path, *arguments):
    out = tmp_path / "evaluated.json"
    assert evaluate.main(["--workdir", str(workdir), "--out", str(out), *arguments]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("run", ["finished", "staged"])
def test_a_finished_run_has_the_bits_of_its_result_and_is_not_touched(run, request, tmp_path):
    workdir = request.getfixturevalue(run)
    before = contents(workdir)
    result = json.loads(runs.result(workdir))
    assert {"status": "complete", **evaluated(workdir, tmp_path)} == result
    assert contents(workdir) == before


def test_the_table_is_that_of_launch_train(staged, capsys):
    runs.run(staged.parent / "config.py", staged)
    trained = capsys.readouterr().out
    evaluate.main(["--workdir", str(staged)])
    assert capsys.readouterr().out.strip() == trained.partition("report:")[0].strip() != ""


def test_best_is_the_checkpoint_with_the_best_metric(finished, tmp_path):
    records = [json.loads(line) for line in runs.lines(finished).splitlines()]
    accuracies = {r["step"]: r["test/accuracy"] for r in records if r["split"] == "eval"}
    best = min(reversed(accuracies), key=lambda step: sum(accuracies[step]))
    result = evaluated(finished, tmp_path, "--step", "best")
    assert result["step"] == best != 40
    assert result["evals"]["test/accuracy"]["values"] == accuracies[best]
    assert evaluated(finished, tmp_path, "--step", str(best)) == result


def test_a_damaged_newest_checkpoint_is_passed_over_and_left_where_it_is(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for path in (workdir / "checkpoints" / "40" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    before = contents(workdir)
    assert evaluated(workdir, tmp_path)["step"] == 30
    assert contents(workdir) == before


def test_a_run_is_not_disturbed_by_an_evaluation_while_it_trains(finished, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    write = writers.MetricWriter.write
    steps = []

    def write_and_evaluate(self, step, split, *arguments, **more):
        write(self, step, split, *arguments, **more)
        if (step, split) == (30, "train"):
            steps.append(evaluated(workdir, tmp_path)["step"])

    monkeypatch.setattr(writers.MetricWriter, "write", write_and_evaluate)
    config = runs.write_config(tmp_path)
    overrides = [f"--config.{key}" for key in ("devices.data=-1", "eval_every=10")]
    assert runs.run(config, workdir, *overrides) == 0
    assert steps in ([10], [20])  # that of 20 may still be being written
    assert json.loads(runs.result(workdir))["evals"] == json.loads(runs.result(finished))["evals"]
    assert runs.lines(workdir) == runs.lines(finished)


def test_a_run_of_more_devices_than_are_here_is_evaluated_on_one(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**config, "devices": {"seed": 2, "data": 64}}))
    accuracy = evaluated(workdir, tmp_path)["evals"]["test/accuracy"]
    assert accuracy == json.loads(runs.result(finished))["evals"]["test/accuracy"]


def test_stages_that_have_not_begun_are_left_out(staged, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(staged, workdir)
    (workdir / "tuned" / "checkpoints").rename(tmp_path / "aside")
    evals = evaluated(workdir, tmp_path)["evals"]
    assert {name.split("/")[0] for name in evals} == {"base"}
    shutil.rmtree(workdir / "base")
    with pytest.raises(UserError, match="no stage has a checkpoint yet"):
        evaluate.main(["--workdir", str(workdir)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir", "RUN/checkpoints"], "no run here"),
        (["--workdir", "RUN/base", "--step", "7"], "no checkpoint of step 7; there are: 30, 40"),
        (["--workdir", "RUN/base", "--step", "best"], "config.best_metric is not set"),
        (["--workdir", "RUN", "--step", "40"], "give --workdir one of: RUN/base, RUN/tuned"),
        (["--workdir", "RUN", "--out", "RUN/result.json"], "inside the run RUN"),
        (["--workdir", "RUN/base", "--out", "RUN/base/plots/a.json"], "inside the run RUN"),
        (["--workdir", "RUN", "--out", "RUN/../absent/a.json"], "a folder that exists"),
    ],
)
def test_bad_input_is_one_line_that_names_the_mend(staged, arguments, message):
    before = contents(staged)
    with pytest.raises(UserError) as error:
        evaluate.main([argument.replace("RUN", str(staged)) for argument in arguments])
    assert message.replace("RUN", str(staged)) in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(staged) == before


DETECTING = runs.CONFIG.replace(
    "    return c",
    """    digits = dict(name="store.arrays", dataset="digits", split="test[:100]")
    noise = dict(name="outliers.uniform_noise", dataset=digits, count=50, maximum=16)
    c.data = dict(name="streams.resident", dataset=digits)
    c.network = dict(name="mlp", num_classes=10, hidden=[8])
    c.optimizer = dict(name="sgd", learning_rate=1e-3)
    detection = dict(name="ood_detection.detection", dataset=digits, ood=dict(noise=noise), scores=["energy"])
    c.evaluators = dict(detection=detection)
    return c""",
)


def test_thresholds_are_written_for_each_score_and_seed(tmp_path):
    workdir = tmp_path / "run"
    assert runs.run(runs.write_config(tmp_path, DETECTING), workdir) == 0
    result = json.loads(runs.result(workdir))
    assert result["definitions"]["detection"]["rule"] == "nearest"
    assert result["definitions"]["detection"]["tpr"] == 0.95
    out = evaluated(workdir, tmp_path, "--threshold", "0.5")
    assert out["definitions"]["detection"]["tpr"] == 0.5
    written = json.loads((workdir / "thresholds.json").read_text())
    (at_half,) = [out["evals"]["detection/threshold/energy"]["values"]]
    assert written == {
        "step": 40,
        "tpr": 0.5,
        "thresholds": {"detection/energy": [value for (value,) in at_half]},
    }
    at_95 = result["evals"]["detection/threshold/energy"]["values"]
    assert all(low < high for (low,), (high,) in zip(at_half, at_95))


def test_thresholds_need_an_evaluator_that_has_them(finished):
    with pytest.raises(UserError, match="no evaluator with thresholds"):
        evaluate.main(["--workdir", str(finished), "--threshold", "0.95"])
    with pytest.raises(SystemExit):
        evaluate.main(["--workdir", str(finished), "--threshold", "1.5"])
