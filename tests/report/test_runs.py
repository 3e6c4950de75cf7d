import json
import math

import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.report.runs import flatten, read_run, read_runs


def test_a_finished_run_gives_its_numbers_and_leaves_out_curves(write_run):
    run = read_run(write_run("a", {"test/accuracy": [0.5, None], "test/roc": [[0.0, 1.0], [0.0, 1.0]]}))
    assert (run.name, run.status, run.step, run.seeds) == ("a", "complete", 10, (0, 1))
    assert list(run.evals) == ["test/accuracy"]
    assert run.evals["test/accuracy"][0] == 0.5
    assert math.isnan(run.evals["test/accuracy"][1])


def test_a_half_written_line_is_passed_over_and_a_repeated_step_counts_once(write_run):
    workdir = write_run("a", steps=40, seeds=2)
    lines = [
        '{"step": 10, "split": "train", "loss": [3.0, 4.0]}',
        '{"step": 20, "split": "train", "loss": [9.0, 9.0]}',
        '{"step": 30, "spl{"step": 20, "split": "train", "loss": [1.0, null], "curve": [[1], [2]]}',
        '{"step": 20, "split": "train", "loss": [1.0, null], "curve": [[1], [2]]}',
        '{"step": 20, "split": "eval", "test/accuracy": [0.25, 0.75]}',
        '{"step": 30, "split": "train", "loss": [0.',
    ]
    (workdir / "metrics.jsonl").write_text("\n".join(lines))
    run = read_run(workdir)
    assert list(run.history) == [("train", "loss"), ("eval", "test/accuracy")]
    np.testing.assert_array_equal(run.history["train", "loss"].steps, [10, 20])
    np.testing.assert_array_equal(run.history["train", "loss"].values, [[3.0, 4.0], [1.0, np.nan]])
    assert (run.status, run.step, run.seeds) == ("unfinished", 20, (0, 1))
    assert run.evals == {"test/accuracy": [0.25, 0.75]}


def test_a_run_that_is_still_running_shows_its_latest_evaluation_and_step(write_run):
    history = [{"step": step, "split": "eval", "test/accuracy": [step / 10]} for step in (2, 4)]
    workdir = write_run("a", {}, history=history)
    result = json.loads((workdir / "result.json").read_text())
    (workdir / "result.json").write_text(json.dumps({**result, "status": "diverged", "step": 0}))
    run = read_run(workdir)
    assert (run.status, run.step, run.evals) == ("diverged", 4, {"test/accuracy": [0.4]})


def test_a_run_without_any_metrics_yet_can_be_read(write_run):
    workdir = write_run("a")
    (workdir / "metrics.jsonl").unlink()
    run = read_run(workdir)
    assert (run.status, run.step, run.evals, run.history) == ("unfinished", 0, {}, {})


def test_a_staged_run_expands_to_the_stages_that_have_begun_in_order(write_run):
    workdir = write_run("a", stages={"pretrain": {}, "finetune": {}, "distil": {}})
    assert [part.stage for part in read_run(workdir).parts()] == [""]
    write_run("a/finetune", {"test/accuracy": [0.75]})
    write_run("a/pretrain", {"test/accuracy": [0.5]})
    parts = read_run(workdir).parts()
    assert [(part.name, part.stage) for part in parts] == [("a", "pretrain"), ("a", "finetune")]
    assert [part.evals["test/accuracy"] for part in parts] == [[0.5], [0.75]]


def test_runs_are_named_by_what_tells_them_apart(write_run):
    folders = [write_run("x/run"), write_run("y/run")]
    assert [run.name for run in read_runs([*folders, folders[0]])] == ["x/run", "y/run"]
    assert [run.name for run in read_runs(folders[:1])] == ["run"]


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing: not a run folder"):
        read_run(tmp_path / "nothing")


@pytest.mark.parametrize("content", ['{"seed": ', "[1]"])
def test_an_unreadable_config_is_named(write_run, content):
    workdir = write_run("a")
    (workdir / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: not"):
        read_run(workdir)


def test_flatten_keeps_empty_sections():
    assert dict(flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": {}})) == {"a.b.c": 1, "a.d": [2], "e": {}}
