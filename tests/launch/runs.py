"""Runs of the toy problem through the command line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from jaxlab.core import UserError
from jaxlab.train import writers
from launch import train

ROOT = Path(__file__).parents[2]

CONFIG = """
from ml_collections import ConfigDict


def get_config(size="cpu"):
    if size not in ("cpu", "paper"):
        raise ValueError(f"no size {size!r}; sizes: cpu, paper")
    c = ConfigDict()
    c.seeds = 2
    c.steps = 40 if size == "cpu" else 400
    c.batch_size = 16
    c.log_every = 10
    c.eval_every = 20
    c.checkpoint_every = 10
    c.data = dict(name="tests.toy:blobs")
    c.network = dict(name="mlp", num_classes=2, hidden=[8], norm="batch_norm")
    c.method = dict(name="supervised.erm")
    c.optimizer = dict(name="sgd", learning_rate=0.1, momentum=0.9)
    c.evaluators = dict(test=dict(name="tests.toy:accuracy"))
    c.devices = dict(seed=1, data=1)
    return c
"""

STAGED = CONFIG.replace(
    "    return c",
    """    c.stages = ConfigDict(sort_keys=False)
    c.stages.tuned = dict(init_from="base", steps=20, optimizer=dict(name="sgd", learning_rate=0.0))
    c.stages.base = dict(steps=40)
    return c""",
)


def write_config(folder, text=CONFIG):
    path = folder / "config.py"
    path.write_text(text)
    return path


def command(config, workdir, *overrides):
    arguments = ["--config", str(config), "--workdir", str(workdir), *overrides]
    return [sys.executable, "-m", "launch.train", *arguments]


def environment(devices=1, **more):
    """For a process of its own, with so many virtual devices, or (None) with those that a user has."""
    flags = f"--xla_force_host_platform_device_count={devices}" if devices else ""
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), **more}


def start(config, workdir, *overrides, env=None):
    return subprocess.Popen(
        command(config, workdir, *overrides),
        cwd=ROOT,
        env=env or environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def end_or_kill(process, seconds):
    """Waits so long for a process to end, then sends it SIGKILL; returns its output and its errors."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()


def run(config, workdir, *overrides):
    """In this process; returns the exit status."""
    return train.main(command(config, workdir, *overrides)[3:])


def stop_at(monkeypatch, step):
    """Sends this process SIGTERM when the training line of `step` is written."""
    write = writers.MetricWriter.write

    def write_and_stop(self, at, split, *arguments, **more):
        write(self, at, split, *arguments, **more)
        if (at, split) == (step, "train"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(writers.MetricWriter, "write", write_and_stop)


def final_state(workdir):
    from jaxlab import experiment

    return jax.device_get(experiment.load(workdir).state)


def differing(workdir, undisturbed):
    """What of a run, of all its stages, is not to the bit as in another: its files and final states."""
    logs = sorted(undisturbed.rglob("metrics.jsonl"))
    found = []
    for path in [*logs, *sorted(undisturbed.rglob("result.json"))]:
        name = path.relative_to(undisturbed)
        if not (workdir / name).exists() or (workdir / name).read_bytes() != path.read_bytes():
            found.append(str(name))
    for log in logs:
        stage = log.parent.relative_to(undisturbed)
        if _final_bits(workdir / stage) != _final_bits(undisturbed / stage):
            found.append(str(stage / "checkpoints"))
    return found


def _final_bits(workdir):
    """The step of the newest checkpoint that can be read, and the bits of its state."""
    from jaxlab import experiment

    try:
        loaded = experiment.load(workdir)
    except UserError as error:
        return str(error)
    return loaded.step, [np.asarray(x).tobytes() for x in jax.tree.leaves(loaded.state)]


def lines(workdir):
    return (workdir / "metrics.jsonl").read_text()


def result(workdir):
    return (workdir / "result.json").read_text()
