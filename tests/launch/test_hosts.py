"""Runs over several processes, with and without a scheduler: the same result, and a clear end where one dies."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.train import devices, lost_hosts
from tests.launch import runs

LOST = (
    "error: another process of this run has gone: killed, failed, or its host is lost; start the same command"
    " on every host again, to go on from the newest checkpoint"
)


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start_processes(count, config, workdir, *overrides, port=None):
    """So many processes on this machine, one device each, that train together."""
    port = port or free_port()
    return [
        runs.start(
            config,
            workdir,
            f"--config.devices.data={count}",
            *overrides,
            env=runs.environment(
                COORDINATOR_ADDRESS=f"localhost:{port}",
                NUM_PROCESSES=str(count),
                PROCESS_ID=str(i),
                JAX_PLATFORMS="cpu",
            ),
        )
        for i in range(count)
    ]


def wait_for(path, processes):
    while not path.exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


def assert_close(workdir, other):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        *map(runs.final_state, (workdir, other)),
    )


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_to_the_result_of_one(tmp_path, count):
    config = runs.write_config(tmp_path, runs.STAGED)
    for process in start_processes(count, config, tmp_path / "several"):
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    assert json.loads(runs.result(tmp_path / "several"))["environment"]["process_count"] == count
    assert runs.run(config, tmp_path / "one") == 0
    assert_close(tmp_path / "several" / "tuned", tmp_path / "one" / "tuned")


LONG = (
    "--config.steps=1000",
    "--config.log_every=100",
    "--config.eval_every=500",
    "--config.checkpoint_every=200",
)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "victim"), [(2, 0), (2, 1), (4, 2)])
def test_where_one_process_is_killed_the_others_say_so_and_the_same_command_goes_on(tmp_path, count, victim):
    config = runs.write_config(tmp_path)
    port = free_port()
    processes = start_processes(count, config, tmp_path / "killed", *LONG, port=port)
    wait_for(tmp_path / "killed" / "checkpoints" / "200", processes)
    processes.pop(victim).kill()
    end = time.monotonic() + 60
    for process in processes:
        _, error = process.communicate(timeout=end - time.monotonic())
        assert process.returncode not in (0, None)
        assert error.splitlines() == [LOST]
    for process in start_processes(count, config, tmp_path / "killed", *LONG, port=port):
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        assert "going on from the checkpoint of step" in error
    for process in start_processes(count, config, tmp_path / "undisturbed", *LONG):
        process.communicate(timeout=300)
    for file in (runs.lines, runs.result):
        assert file(tmp_path / "killed") == file(tmp_path / "undisturbed")
    states = [runs.final_state(tmp_path / name) for name in ("killed", "undisturbed")]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_only_what_jax_says_of_a_lost_process_becomes_one_line():
    notes = (
        b"W1122 12:15:35.135094   20372 preemption_sync_manager.cc:147] Failed to retrieve\nAdditional\n",
        b"F1122 12:15:35.135210   20372 client.h:80] Terminating process because the JAX distributed service"
        b" detected fatal errors. This most likely\n*** Check failure stack trace: ***\n    @ 0x7fe491a40634\n",
    )
    other = b"W1122 12:15:35.135094   20372 cpu_client.cc:1] slow\n"
    assert passed_on(other + notes[0]) == other + notes[0]
    assert passed_on(other + b"".join(notes)) == other + LOST.encode() + b"\n"
    never = notes[1] + b"RPC: /xla.coordination.CoordinationService/RegisterTask\n"
    assert passed_on(never).startswith(b"error: another process of this run did not come; start the same")


@pytest.mark.parametrize(
    "environment",
    [
        {"COORDINATOR_ADDRESS": "here", "NUM_PROCESSES": "2", "PROCESS_ID": "0"},
        {"COORDINATOR_ADDRESS": "here:1", "NUM_PROCESSES": "2", "PROCESS_ID": "2"},
        {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"},
    ],
    ids=["no port", "no such process", "not under srun"],
)
def test_an_environment_that_does_not_say_where_the_others_are_is_one_line(monkeypatch, environment):
    monkeypatch.setattr(devices, "relay_stderr", lambda: None)
    # It refuses to begin in a process that has used JAX.
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="environment: it does not say where .* with srun, elsewhere set"):
        devices.initialize_hosts()


def passed_on(text):
    sink = io.BytesIO()
    lost_hosts.relay(io.BytesIO(text), sink)
    return sink.getvalue()


@pytest.mark.slow
def test_two_processes_stop_together_on_a_signal_to_one_and_go_on(tmp_path):
    config = runs.write_config(tmp_path)
    processes = start_processes(2, config, tmp_path / "two", *LONG)
    wait_for(tmp_path / "two" / "metrics.jsonl", processes)
    processes[1].terminate()
    for process in processes:
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    for process in start_processes(2, config, tmp_path / "two", *LONG):
        assert process.wait(timeout=300) == 0
    steps = [
        json.loads(line)["step"] for line in runs.lines(tmp_path / "two").splitlines() if '"train"' in line
    ]
    assert steps == list(range(100, 1001, 100))


@pytest.mark.slow
def test_what_only_the_first_of_two_processes_finds_ends_both(tmp_path):
    config = runs.write_config(tmp_path)
    assert runs.run(config, tmp_path / "run") == 0
    for process in start_processes(2, config, tmp_path / "run", "--config.optimizer.learning_rate=0.2"):
        _, error = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "holds a run of another config" in error


SCRIPTS = runs.ROOT / "launch"


@pytest.mark.skipif(
    shutil.which("shellcheck") is None and not (Path(sys.executable).parent / "shellcheck").exists(),
    reason="shellcheck is not installed",
)
def test_shellcheck_finds_nothing_in_the_launch_scripts():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    found = subprocess.run(
        ["shellcheck", "--enable=all", "--exclude=SC2250,SC2310,SC2312", *sorted(SCRIPTS.glob("*.sh"))],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """`fake(name, script)` puts a program on the PATH that notes its arguments and then runs the script."""
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    calls.touch()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("STATE", str(tmp_path))

    def make(name, script=""):
        path = programs / name
        path.write_text(f'#!/usr/bin/env bash\nset -u\necho "${{0##*/}} $*" >> "$CALLS"\n{script}\n')
        path.chmod(0o755)

    make.calls = lambda: calls.read_text().splitlines()
    return make


@pytest.fixture
def slurm(fake):
    """What SLURM's commands do for the script, on this machine."""
    # SLURM runs a copy of the script, where the job was submitted.
    fake("sbatch", 'cp "$1" "$STATE/slurm_script"; shift; exec bash "$STATE/slurm_script" "$@"')
    fake(
        "srun",
        """
        options=(--kill-on-bad-exit=0)
        [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || options+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
        [[ "$*" == "${options[*]} "* ]] || exit 99
        shift ${#options[@]}
        for ((i = 0; i < SLURM_NTASKS; i++)); do
          SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 "$@" &
          echo $! >> "$STATE/tasks"
        done
        status=0
        for task in $(cat "$STATE/tasks"); do wait "$task" || status=$?; done
        rm "$STATE/tasks"
        exit "$status"
        """,
    )
    fake("scancel", 'kill -TERM $(cat "$STATE/tasks")')
    fake("scontrol")
    fake("squeue", "echo RUNNING")
    return fake


def submit(*arguments, **environment):
    """The batch script of a job of this number, in a process of its own."""
    return subprocess.Popen(
        ["sbatch", SCRIPTS / "slurm.sh", *map(str, arguments)],
        cwd=runs.ROOT,
        env={**os.environ, "SLURM_JOB_ID": "7", **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_the_slurm_script_starts_the_same_command_on_every_task(slurm):
    slurm("python")
    job = submit(
        "c.py:paper",
        "runs/my run",
        "--config.seeds=2",
        PYTHON="python",
        SLURM_NTASKS="2",
        SLURM_CPUS_PER_TASK="3",
    )
    assert job.wait() == 0
    train = "-m launch.train --config c.py:paper --workdir runs/my run --config.seeds=2"
    assert slurm.calls()[1:] == [
        f"srun --kill-on-bad-exit=0 --cpus-per-task=3 python {train}",
        *[f"python {train}"] * 2,
    ]


@pytest.mark.parametrize(
    ("signals", "job_state", "ending", "last_call"),
    [
        (["USR1"], "RUNNING", "exit 143", "scontrol requeue 7"),
        (["USR1", "USR1"], "RUNNING", "sleep 0.3; exit 143", "scontrol requeue 7"),
        (["USR1"], "RUNNING", "exit 0", "scancel --signal=TERM 7"),
        (["TERM"], "RUNNING", "exit 143", "scontrol requeue 7"),
        (["TERM"], "COMPLETING", "exit 143", "squeue --noheader --jobs=7 --format=%T"),
    ],
    ids=["time limit", "warned twice", "complete in time", "preempted", "cancelled"],
)
def test_a_slurm_job_that_is_stopped_checkpoints_and_queues_again(
    slurm, tmp_path, signals, job_state, ending, last_call
):
    slurm("squeue", f"echo {job_state}")
    # A process that a second SIGTERM would end at once.
    process = (
        f'trap \'trap "exit 1" TERM; {ending}\' TERM; touch "$STATE/running"; while :; do sleep 0.05; done'
    )
    slurm("python", process)
    job = submit("c.py", "runs/c", PYTHON="python", SLURM_NTASKS="1")
    wait_for(tmp_path / "running", [job])
    for name in signals:
        if name == "TERM":  # SLURM sends it to every process of the job
            os.kill(int((tmp_path / "tasks").read_text()), signal.SIGTERM)
        job.send_signal(signal.Signals[f"SIG{name}"])
        time.sleep(0.1)
    assert job.wait(timeout=20) == (0 if ending == "exit 0" else 143)
    assert slurm.calls()[-1] == last_call
    assert slurm.calls().count("scancel --signal=TERM 7") == ("USR1" in signals)


def test_a_slurm_job_that_fails_is_not_queued_again(slurm):
    slurm("python", "exit 2")
    job = submit("c.py", "runs/c", PYTHON="python", SLURM_NTASKS="1")
    assert job.wait() == 2
    assert [call.split()[0] for call in slurm.calls()] == ["sbatch", "srun", "python"]


@pytest.mark.parametrize(
    ("script", "arguments"), [("slurm.sh", ["c.py", "runs/c"]), ("tpu_pod.sh", ["pod", "zone", "c.py"])]
)
def test_a_launch_script_in_the_wrong_place_tells_its_use(script, arguments):
    told = subprocess.run(["bash", SCRIPTS / script, *arguments], capture_output=True, text=True)
    assert told.returncode == 2
    assert told.stderr.startswith("usage: ")


@pytest.mark.slow
def test_a_slurm_job_of_two_processes_trains_across_a_preemption_to_the_result_of_one(slurm, tmp_path):
    config = runs.write_config(tmp_path)
    arguments = (config, tmp_path / "run", "--config.devices.data=2", *LONG)
    environment = runs.environment(
        PYTHON=sys.executable,
        SLURM_JOB_ID=str(np.random.default_rng().integers(10**6)),  # JAX makes its port of it
        SLURM_NTASKS="2",
        JAX_PLATFORMS="cpu",
    )
    first = submit(*arguments, **environment)
    wait_for(tmp_path / "run" / "metrics.jsonl", [first])
    first.send_signal(signal.SIGUSR1)
    _, error = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM, error
    assert "stopped by SIGTERM after step" in error
    assert slurm.calls()[-1] == f"scontrol requeue {environment['SLURM_JOB_ID']}"
    second = submit(*arguments, **environment)
    _, error = second.communicate(timeout=300)
    assert second.returncode == 0, error
    assert "going on from the checkpoint of step" in error
    assert json.loads(runs.result(tmp_path / "run"))["environment"]["process_count"] == 2
    assert runs.run(config, tmp_path / "one", *LONG) == 0
    assert_close(tmp_path / "run", tmp_path / "one")


def test_the_tpu_script_makes_a_preempted_pod_again_and_runs_the_same_command_on_all_hosts(fake, tmp_path):
    """The pod is absent at first, is preempted while it trains, and there is none at the first try to make it again."""
    fake("git")
    fake("sleep")
    fake(
        "gcloud",
        """
        case "$*" in
        *" describe "*) cat "$STATE/state" ;;
        *" create "*)
          echo >> "$STATE/tries"
          [[ $(wc -l < "$STATE/tries") != 2 ]] || exit 1
          echo READY > "$STATE/state" ;;
        *" delete "*) rm "$STATE/state" ;;
        *launch.train*)
          echo >> "$STATE/starts"
          [[ $(wc -l < "$STATE/starts") == 1 ]] || exit 0
          echo PREEMPTED > "$STATE/state"
          exit 255 ;;
        esac
        """,
    )
    environment = {"ACCELERATOR": "v4-32", "VERSION": "base", "SETUP": "mount x", "TMPDIR": str(tmp_path)}
    subprocess.run(
        [
            "bash",
            SCRIPTS / "tpu_pod.sh",
            "pod",
            "zone",
            "c.py:paper",
            "/mnt/my run",
            "--config.network.hidden=[8]",
        ],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
    )
    calls = [re.sub(r"[^ =]*/tmp\.\S+\.tar", "CODE", call) for call in fake.calls()]
    tpu = "gcloud compute tpus tpu-vm"
    describe = f"{tpu} describe pod --format=value(state) --zone=zone"
    create = f"{tpu} create pod --accelerator-type=v4-32 --version=base --spot --zone=zone"
    train = [
        "git archive --output=CODE HEAD",
        f"{tpu} scp CODE pod:jaxlab.tar --worker=all --zone=zone",
        f"{tpu} ssh pod --worker=all --command={{ mount x; }} && mkdir -p jaxlab && tar -xf jaxlab.tar -C jaxlab &&",
        "      make -C jaxlab PYTHON=python3 .venv/.installed-tpu --zone=zone",
        f"{tpu} ssh pod --worker=all --command=cd jaxlab && .venv/bin/python -m launch.train --config c.py:paper"
        " --workdir /mnt/my\\ run --config.network.hidden=\\[8\\]  --zone=zone",
    ]
    delete = f"{tpu} delete pod --quiet --zone=zone"
    assert calls == [describe, create, *train, *[describe] * 3, delete, create, "sleep 60", create, *train]
    assert not list(tmp_path.glob("tmp.*"))


def test_the_tpu_script_ends_where_the_run_fails_on_a_pod_that_is_up(fake):
    fake("git")
    fake("gcloud", 'case "$*" in *" describe "*) echo READY ;; *launch.train*) exit 2 ;; esac')
    ended = subprocess.run(
        ["bash", SCRIPTS / "tpu_pod.sh", "pod", "zone", "c.py", "/mnt/c"], capture_output=True
    )
    assert ended.returncode == 2
    assert sum("launch.train" in call for call in fake.calls()) == 1
