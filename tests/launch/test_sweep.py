"""launch.sweep trains every combination once, whatever fails or stops in between."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from jaxlab.core import UserError
from launch import sweep, train
from tests.launch import runs

RATES = "config.optimizer.learning_rate"
SHORT = ["--config.steps=10", "--config.seeds=1"]


@pytest.fixture
def started(monkeypatch):
    """Trains in this process; the names of the runs that were started."""
    names = []

    def run(command):
        names.append(os.path.basename(command[command.index("--workdir") + 1]))
        try:
            return train.main(command[3:]), 0
        except UserError as error:
            return error.status, 0

    monkeypatch.setattr(sweep, "_run", run)
    return names


@pytest.fixture
def arguments(tmp_path):
    return ["--config", str(runs.write_config(tmp_path)), "--workdir", str(tmp_path / "sweep")]


def test_a_sweep_goes_on_past_failures_and_another_grid_adds_runs(arguments, started, tmp_path, capsys):
    assert sweep.main([*arguments, "--grid", f"{RATES}=1e30,0.1", *SHORT]) == 1
    output = capsys.readouterr()
    failing, first = "optimizer.learning_rate=1e30", "optimizer.learning_rate=0.1"
    assert started == [failing, first]
    assert f"[2/2] {first}" in output.out
    assert re.search(rf"failed with exit status 1: .*{RATES}=1e30", output.err)
    assert "1 of 2 runs failed" in output.err
    folder = tmp_path / "sweep"
    assert not (folder / "report").exists()

    started.clear()
    assert sweep.main([*arguments, "--grid", f"{RATES}=0.1,0.2", *SHORT]) == 0
    output = capsys.readouterr()
    second = "optimizer.learning_rate=0.2"
    assert started == [second]
    assert f"[1/2] {first}: complete" in output.out
    table = output.out.rpartition(str(folder / second))[2].partition("accuracy")[2]
    assert re.findall(r"^ (optimizer\S+) +(\d+\.\d+)", table, re.MULTILINE) == [
        (name, f"{100 * accuracy(folder / name):.2f}") for name in (first, second)
    ]
    assert (folder / "report" / "index.html").is_file()
    record = json.loads((folder / "sweep.json").read_text())
    assert record["config"]["steps"] == 10
    assert [search["grid"] for search in record["searches"]] == [
        {"optimizer.learning_rate": ["1e30", "0.1"]},
        {"optimizer.learning_rate": ["0.1", "0.2"]},
    ]
    assert record["runs"] == {
        f"optimizer.learning_rate={rate}": {"optimizer.learning_rate": rate}
        for rate in ("1e30", "0.1", "0.2")
    }

    with pytest.raises(UserError, match="holds a sweep of another config: steps: 10 → 20"):
        sweep.main([*arguments, "--grid", f"{RATES}=0.1", "--config.steps=20", "--config.seeds=1"])
    assert started == [second]


def accuracy(workdir):
    return json.loads(runs.result(workdir))["evals"]["test/accuracy"]["mean"]


def test_a_run_is_a_process_of_launch_train(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    assert sweep.main([*arguments, "--grid", "config.network.hidden=[4, 4]", *SHORT]) == 0
    result = json.loads(runs.result(tmp_path / "sweep" / "network.hidden=[4,4]"))
    assert (result["status"], result["config"]["network"]["hidden"]) == ("complete", [4, 4])


def test_a_signal_is_passed_on_and_stops_the_sweep(tmp_path, monkeypatch, arguments, capsys):
    ready = tmp_path / "ready"
    child = f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(tmp_path / "saved")!r}).touch(), sys.exit(143)))
pathlib.Path({str(ready)!r}).touch()
time.sleep(60)
"""
    monkeypatch.setattr(sweep, "_train_command", lambda *_: [sys.executable, "-c", child])

    def send():
        while not ready.exists():
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    before = signal.getsignal(signal.SIGTERM)
    assert sweep.main([*arguments, "--grid", f"{RATES}=0.1,0.2"]) == 143
    assert (tmp_path / "saved").exists()
    output = capsys.readouterr()
    assert "[1/2]" in output.out
    assert "[2/2]" not in output.out
    assert "run the same command to go on" in output.err
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.5,0.7", ["0.5", "0.7"]),
        ("[64],[128, 128],[]", ["[64]", "[128,128]", "[]"]),
        ("'a, b',\"c,[\",d", ["'a, b'", '"c,["', "d"]),
        ("{'a': (1, 2)}, 'it''s'", ["{'a':(1,2)}", "'it''s'"]),
    ],
)
def test_only_commas_outside_of_brackets_and_quotes_separate(text, values):
    assert sweep.split(text, "") == values


def test_runs_are_all_combinations_each_with_every_draw():
    grid = {"seed": ["0", "1"], "method.q": ["0.5", "0.7"]}
    assert list(sweep.combine(grid, {}, draws=0, seed=0)) == [
        "method.q=0.5,seed=0",
        "method.q=0.7,seed=0",
        "method.q=0.5,seed=1",
        "method.q=0.7,seed=1",
    ]
    both = sweep.combine({"seed": ["0", "1"]}, {"method.q": "uniform(0,1)"}, draws=3, seed=0)
    draws = [{run["method.q"] for run in both.values() if run["seed"] == seed} for seed in "01"]
    assert draws[0] == draws[1]
    assert len(draws[0]) == 3


def test_draws_follow_from_the_seed_and_more_of_them_begin_with_the_same():
    samples = {"b": "loguniform(1e-4,1e-1)", "a": "choice(32,64)"}

    def draw(draws, seed, samples=samples):
        return list(sweep.combine({}, samples, draws=draws, seed=seed))

    assert draw(5, 0) == draw(5, 0, dict(reversed(samples.items()))) == draw(9, 0)[:5]
    assert not set(draw(5, 0)) & set(draw(5, 1))


@pytest.mark.parametrize(
    ("distribution", "quantiles"),
    [
        ("uniform(-1,3)", {0: "-1", 0.25: "0", 0.5: "1"}),
        ("loguniform(1e-4,1e-2)", {0: "0.0001", 0.5: "0.001"}),
        ("randint(1,3)", {0: "1", 0.33: "1", 0.34: "2", 0.66: "2", 0.67: "3", 1 - 2**-53: "3"}),
        ("choice([8],'a,b')", {0: "[8]", 0.49: "[8]", 0.5: "'a,b'", 1 - 2**-53: "'a,b'"}),
    ],
)
def test_quantiles_are_those_of_the_distribution(distribution, quantiles):
    quantile = sweep.quantile_function(distribution, "")
    assert {u: quantile(u) for u in quantiles} == quantiles


def test_names_are_unique_readable_and_safe_in_any_file_system():
    values = ["a/b", "a_b", "a:b", "..", "'a b'", "ü", "x" * 300, "x" * 301, "[64,128]", "*", "-1"]
    names = [sweep.run_name({"method.q": value}) for value in values]
    assert len(set(names)) == len(values)
    assert all(re.fullmatch(r"method\.q=[\w.,()\[\]-]*", name, re.ASCII) for name in names)
    assert max(map(len, names)) <= 255
    assert sweep.run_name({"method.q": "0.5", "network.hidden": "[64,128]"}) == (
        "method.q=0.5,network.hidden=[64,128]"
    )


def test_the_slurm_script_runs_exactly_the_commands(tmp_path, monkeypatch):
    stub = tmp_path / "it's a 'stub'"
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$PWD" "$@"\n')
    stub.chmod(0o755)
    folder = tmp_path / "50% $HOME `x`"
    folder.mkdir()
    monkeypatch.chdir(folder)
    commands = [[str(stub), "--config.a='it''s'"], [str(stub), '--config.b=["x y", "$(z)"]', "*"]]
    script = sweep.slurm_script(commands, folder)
    assert "#SBATCH --array=0-1\n" in script
    assert f"--output='{tmp_path}/50%% $HOME `x`/slurm-%A_%a.out'\n" in script
    for task, command in enumerate(commands):
        done = subprocess.run(
            ["bash", "-"],
            input=script,
            env={**os.environ, "SLURM_ARRAY_TASK_ID": str(task)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines() == [str(folder), *command[1:]]


def test_slurm_submits_only_what_is_left_and_prints_nothing_else(arguments, started, capsys):
    grid = ["--grid", f"{RATES}=0.1,0.2"]
    assert sweep.main([*arguments, "--grid", f"{RATES}=0.1", *SHORT]) == 0
    capsys.readouterr()
    assert sweep.main([*arguments, *grid, *SHORT, "--slurm"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n#SBATCH")
    assert f"{RATES}=0.2" in script
    assert f"{RATES}=0.1" not in script
    assert len(started) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--grid", "config.method.q=0.5"], "config.method.q: erm() takes no 'q'"),
        (["--grid", "config.steps=10,0"], "config.steps: expected 1 or more, got 0"),
        (["--grid", "config.steps=10,ten"], "config.steps: a config expects int, got 'ten'"),
        (["--grid", "steps=10"], "--grid steps=10: write --grid config.KEY="),
        (["--grid", "config.steps=10,,20"], "--grid steps: an empty value"),
        (["--grid", "config.network.hidden=[8,[9]"], "--grid network.hidden: brackets or quotes"),
        (["--grid", "config.steps=1", "--grid", "config.steps=2"], "config.steps is given more than once"),
        (["--grid", "config.steps=1", "--config.steps=2"], "config.steps: given more than once"),
        ([], "give --grid, or --random with --sample"),
        (["--random", "2", "--grid", "config.steps=1"], "--random: give a number of draws together"),
        (["--sample", "config.steps=randint(1,9)"], "--random: give a number of draws together"),
        (["--random", "1", "--sample", "config.steps=rand(1,9)"], "Did you mean 'randint'?"),
        (["--random", "1", "--sample", "config.steps=randint(1,2.5)"], "randint takes two whole numbers"),
        (["--random", "1", "--sample", "config.steps=randint(9,1)"], "randint needs -inf < low < high"),
        (["--random", "1", "--sample", "config.clip_norm=loguniform(0,1)"], "needs 0 < low < high"),
        (["--random", "9", "--sample", "config.seeds=choice(1,0)"], "config.seeds: expected 1 or more"),
        (["--grid", "config.steps=10", "--dry"], "--dry: not an option"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(arguments, started, tmp_path, more, message):
    with pytest.raises(UserError) as error:
        sweep.main([*arguments, *more])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not started
    assert not (tmp_path / "sweep").exists()


def test_the_folder_of_a_run_is_refused(arguments, started, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run, not a sweep"):
        sweep.main([*arguments, "--grid", "config.steps=10"])
