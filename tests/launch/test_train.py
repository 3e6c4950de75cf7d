"""launch.train, as a user meets it: it finishes, it resumes, and it says in one line what is wrong."""

import fcntl
import json
import os
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest

from jaxlab import experiment
from jaxlab.core import UserError
from tests import stress
from tests.launch import runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A config file and the folder of a run of it that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    config = runs.write_config(folder)
    assert runs.run(config, folder / "run") == 0
    return config, folder / "run"


def test_a_run_leaves_every_file_it_promises(finished):
    _, workdir = finished
    result = json.loads(runs.result(workdir))
    assert (result["status"], result["step"], result["seeds"]) == ("complete", 40, [0, 1])
    assert result["config"] == json.loads((workdir / "config.json").read_text())
    accuracy = result["evals"]["test/accuracy"]
    assert len(accuracy["values"]) == 2
    assert accuracy["mean"] == pytest.approx(np.mean(accuracy["values"]))
    assert accuracy["stderr"] == pytest.approx(np.std(accuracy["values"], ddof=1) / np.sqrt(2))
    assert np.shape(result["evals"]["test/margins"]["values"]) == (2, 64)
    records = [json.loads(line) for line in runs.lines(workdir).splitlines()]
    assert [r["step"] for r in records if r["split"] == "train"] == [10, 20, 30, 40]
    assert [r["step"] for r in records if r["split"] == "eval"] == [20, 40]
    assert len(records[0]["loss"]) == 2
    assert list(workdir.glob("events.out.*"))
    assert (workdir / "report" / "index.html").is_file()


def test_the_toy_problem_is_learnt(finished):
    assert min(json.loads(runs.result(finished[1]))["evals"]["test/accuracy"]["values"]) > 0.9


def test_on_a_cpu_the_default_spreads_seeds_over_the_cores(finished, tmp_path):
    config, on_one_device = finished
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = runs.environment(devices=None, JAX_PLATFORMS="cpu")
    process = runs.start(config, tmp_path, "--config.devices.data=-1", env=environment)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    result = json.loads(runs.result(tmp_path))
    assert result["environment"]["device_count"] == min(2, cores)
    states = [runs.final_state(workdir) for workdir in (tmp_path, on_one_device)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *states)
    assert (
        result["evals"]["test/accuracy"] == json.loads(runs.result(on_one_device))["evals"]["test/accuracy"]
    )


def test_a_finished_run_prints_its_result_and_changes_nothing(finished, capsys):
    config, workdir = finished
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file() and "report" not in p.parts}
    assert runs.run(config, workdir) == 0
    assert "accuracy" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in before} == before


def test_sigterm_checkpoints_and_the_run_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch, capsys):
    config, undisturbed = finished
    with monkeypatch.context() as patch:
        runs.stop_at(patch, 10)
        assert runs.run(config, tmp_path, "--config.steps_per_call=3") == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 13" in capsys.readouterr().err
    interrupted = json.loads(runs.result(tmp_path))
    assert (interrupted["status"], interrupted["step"]) == ("interrupted", 13)
    assert runs.run(config, tmp_path) == 0
    assert runs.lines(tmp_path) == runs.lines(undisturbed)
    assert runs.result(tmp_path) == runs.result(undisturbed)
    jax.tree.map(np.testing.assert_array_equal, runs.final_state(tmp_path), runs.final_state(undisturbed))


def kill_until_done(config, workdir, kills, seed, *overrides):
    """Kills a run with SIGKILL so many times at random moments after it made progress, then lets it end."""
    rng = np.random.default_rng(seed)
    for _ in range(kills):
        process = runs.start(config, workdir, *overrides)
        runs.end_or_kill(process, rng.uniform(2.5, 9.0))
        if process.returncode != -signal.SIGKILL:
            break
    process = runs.start(config, workdir, *overrides)
    output, error = process.communicate()
    assert process.returncode == 0, error
    return output


LONG = (
    "--config.steps=40000",
    "--config.log_every=100",
    "--config.checkpoint_every=200",
    "--config.eval_every=4000",
)


@pytest.mark.parametrize(
    ("kills", "overrides"),
    [
        (3, LONG),
        pytest.param(25, (*LONG, "--config.steps=120000"), marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path, kills, overrides):
    config = runs.write_config(tmp_path)
    undisturbed = runs.start(config, tmp_path / "undisturbed", *overrides)
    kill_until_done(config, tmp_path / "killed", kills, 0, *overrides)
    undisturbed.communicate()
    assert runs.differing(tmp_path / "killed", tmp_path / "undisturbed") == []


def test_a_half_written_line_of_a_killed_run_is_written_again(finished, tmp_path):
    config, undisturbed = finished
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "result.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "40")
    half = runs.lines(tmp_path)[:-30]
    (tmp_path / "metrics.jsonl").write_text(half + '\n{"step": 50, "split": "train"}\n{"step"')
    assert runs.run(config, tmp_path) == 0
    assert runs.lines(tmp_path) == runs.lines(undisturbed)
    assert runs.result(tmp_path) == runs.result(undisturbed)


def test_what_differs_from_an_undisturbed_run_is_found(finished, tmp_path):
    _, undisturbed = finished
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    assert runs.differing(tmp_path, undisturbed) == []
    for name in ("metrics.jsonl", "result.json"):
        (tmp_path / name).write_text((tmp_path / name).read_text().replace("1", "2"))
    shutil.rmtree(tmp_path / "checkpoints" / "40")
    assert runs.differing(tmp_path, undisturbed) == ["metrics.jsonl", "result.json", "checkpoints"]


@pytest.mark.parametrize("kind", stress.DAMAGES)
def test_a_damaged_newest_checkpoint_costs_only_time(finished, tmp_path, kind):
    config, undisturbed = finished
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    assert stress.in_use(str(config), tmp_path) == []
    (tmp_path / "result.json").unlink()
    damaged = stress.damage(kind, stress.in_use(str(config), tmp_path), np.random.default_rng(0))
    assert damaged == tmp_path / "checkpoints" / "40"
    assert runs.run(config, tmp_path) == 0
    assert (tmp_path / "checkpoints.unreadable" / "40-0").exists()
    assert runs.differing(tmp_path, undisturbed) == []


def test_a_checkpoint_of_eight_devices_resumes_on_one_and_on_two(finished, tmp_path, monkeypatch):
    config, undisturbed = finished
    with monkeypatch.context() as patch:
        runs.stop_at(patch, 20)
        assert runs.run(config, tmp_path / "8", "--config.devices.data=4", "--config.devices.seed=2") != 0
    for data in (1, 2):
        workdir = tmp_path / str(data)
        shutil.copytree(tmp_path / "8", workdir)
        assert runs.run(config, workdir, f"--config.devices.data={data}") == 0
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
            runs.final_state(workdir),
            runs.final_state(undisturbed),
        )


def test_a_stage_starts_from_the_variables_of_the_one_it_names(tmp_path):
    config = runs.write_config(tmp_path, runs.STAGED)
    assert runs.run(config, tmp_path / "run") == 0
    base, tuned = (experiment.load(tmp_path / "run" / name).state for name in ("base", "tuned"))
    # The second stage's learning rate is zero, so only batch statistics move.
    jax.tree.map(np.testing.assert_array_equal, base.variables["params"], tuned.variables["params"])
    result = json.loads(runs.result(tmp_path / "run"))
    assert list(result["config"]["stages"]) == ["base", "tuned"]
    assert {"base/test/accuracy", "tuned/test/accuracy"} <= set(result["evals"])
    assert result["step"] == 60


@pytest.mark.parametrize("devices", [("1", "8"), ("2", "2")], ids="x".join)
def test_stages_hand_over_on_many_devices_as_on_one(tmp_path, devices):
    config = runs.write_config(tmp_path, runs.STAGED)
    many = [f"--config.devices.{axis}={size}" for axis, size in zip(("seed", "data"), devices)]
    for name, overrides in (("one", []), ("many", many)):
        assert runs.run(config, tmp_path / name, *overrides) == 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        *(runs.final_state(tmp_path / name / "tuned") for name in ("one", "many")),
    )


def test_a_damaged_last_checkpoint_of_a_stage_is_made_again_before_it_is_handed_over(tmp_path):
    config = runs.write_config(tmp_path, runs.STAGED)
    for name in ("undisturbed", "damaged"):
        assert runs.run(config, tmp_path / name) == 0
    shutil.rmtree(tmp_path / "damaged" / "tuned")
    for path in (tmp_path / "damaged" / "base" / "checkpoints" / "40").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert runs.run(config, tmp_path / "damaged") == 0
    for file in ("base/metrics.jsonl", "base/result.json", "tuned/metrics.jsonl", "tuned/result.json"):
        assert (tmp_path / "damaged" / file).read_text() == (tmp_path / "undisturbed" / file).read_text()


def test_a_signal_in_the_last_call_of_a_stage_stops_the_run_before_the_next(tmp_path, monkeypatch):
    config = runs.write_config(tmp_path, runs.STAGED)
    with monkeypatch.context() as patch:
        runs.stop_at(patch, 40)
        assert runs.run(config, tmp_path / "run") == 128 + signal.SIGTERM
    assert json.loads(runs.result(tmp_path / "run" / "base"))["status"] == "complete"
    assert not (tmp_path / "run" / "tuned" / "metrics.jsonl").exists()
    assert runs.run(config, tmp_path / "run") == 0


def test_stages_that_do_not_fit_are_refused(tmp_path):
    config = runs.write_config(tmp_path, runs.STAGED)
    with pytest.raises(
        UserError, match=r"stages.tuned.init_from: 'base' has 3 seeds and this run 2; give both"
    ):
        runs.run(config, tmp_path / "seeds", "--config.stages.base.seeds=3", "--config.stages.base.steps=10")
    wider = (
        '--config.stages.tuned.network={"name": "mlp", "num_classes": 2, "hidden": [9], "norm": "batch_norm"}'
    )
    with pytest.raises(UserError, match=r"stages.tuned: init_from: .* does not fit the network: .*8\].*9\]"):
        runs.run(config, tmp_path / "run", "--config.stages.base.steps=10", wider)
    assert not (tmp_path / "run" / "base" / "metrics.jsonl").exists()  # found before anything was trained


def test_divergence_names_step_metric_and_seed_and_keeps_the_good_checkpoint(tmp_path):
    config = runs.write_config(tmp_path, runs.CONFIG.replace("tests.toy:blobs", "tests.toy:exploding"))
    with pytest.raises(
        UserError, match="'loss' is not finite at step 25 of seed 0; the checkpoint of step 20"
    ) as e:
        runs.run(config, tmp_path / "run", "--config.data.at=25")
    assert e.value.status == 1
    assert json.loads(runs.result(tmp_path / "run"))["status"] == "diverged"
    assert experiment.load(tmp_path / "run").step == 20


def test_a_workdir_in_use_is_refused(finished):
    config, workdir = finished
    with (workdir / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by process"):
            runs.run(config, workdir)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.stepz=3"], r"config.stepz: no such key. Did you mean 'steps'\?"),
        (
            ["--config.network.hiden=[3]"],
            r"config.network.hiden: mlp\(\) takes no 'hiden'. Did you mean 'hidden'",
        ),
        (["--config.netwrk.hidden=[3]"], "config.netwrk: no such section. Did you mean 'network'"),
        (["--config.network.hidden=wide"], "config.network.hidden: .*expects .*, got 'wide'"),
        (["--config.steps=many"], "config.steps: .*expects int, got 'many'"),
        (["--config.steps=0"], "config.steps: expected 1 or more, got 0"),
        (["--config.seed=-1"], "config.seed: expected 0 or more"),
        (["--config.backend=tpu"], "config.backend: .*expects 'mesh' or 'pmap', got 'tpu'"),
        (["--config.method.name=supervised.erms"], "no 'supervised.erms'.*Did you mean 'supervised.erm'"),
        (["--config.devices.data=3"], "config.batch_size: 16 is not a multiple of devices.data=3"),
        (["--config.devices.rows=3"], "config.devices.rows: .*no such key"),
        (["--config.best_metric=test/acc"], "config.best_metric: no 'test/acc' is evaluated"),
        (["--config.init_from=pretrain"], "config.init_from: .*pretrain: no run here"),
        (["--config.steps"], "needs a value"),
        (["--steps=3"], "--steps=3: not an option"),
    ],
)
def test_bad_input_is_one_line_that_names_the_field(tmp_path, overrides, message):
    config = runs.write_config(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        runs.run(config, tmp_path / "run", *overrides)
    assert "\n" not in str(raised.value)


def test_an_unknown_config_file_or_size_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.py: no such config file"):
        runs.run(tmp_path / "nowhere.py", tmp_path / "run")
    with pytest.raises(UserError, match=r"no size 'papre'; sizes: cpu, paper"):
        runs.run(f"{runs.write_config(tmp_path)}:papre", tmp_path / "run")


def test_another_config_in_a_workdir_is_refused_with_what_differs(finished):
    config, workdir = finished
    with pytest.raises(UserError, match="holds a run of another config: optimizer.learning_rate: 0.1 → 0.2"):
        runs.run(config, workdir, "--config.optimizer.learning_rate=0.2")


def test_a_config_that_never_began_may_be_mended_in_the_same_workdir(tmp_path):
    config = runs.write_config(tmp_path)
    with pytest.raises(UserError, match="not a multiple"):
        runs.run(config, tmp_path / "run", "--config.devices.data=3")
    assert runs.run(config, tmp_path / "run", "--config.batch_size=8", "--config.steps=10") == 0


def test_a_mistake_ends_a_process_with_status_2_and_one_line(tmp_path):
    config = runs.write_config(tmp_path)
    process = runs.start(config, tmp_path / "run", "--config.stepz=3")
    output, error = process.communicate()
    assert process.returncode == 2
    assert error.count("\n") == 1
    assert error.startswith("error: config.stepz")
    assert not output


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--workdir .*file/run: cannot be written"):
        runs.run(runs.write_config(tmp_path), tmp_path / "file" / "run")


def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_is_good(finished, tmp_path):
    """A limit on the size of files stands for the full disk: the log outgrows it."""
    config, _ = finished
    command = runs.command(config, tmp_path, "--config.steps=100000", "--config.checkpoint_every=100")
    limited = ["bash", "-c", 'ulimit -f 40; exec "$@"', "bash", *command]  # in units of 1024 bytes
    process = subprocess.run(limited, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True)
    assert process.returncode == 2, process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in process.stderr
    assert experiment.load(tmp_path).step >= 100
