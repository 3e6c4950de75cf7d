"""Trains what a config describes, from wherever an earlier call of the same command stopped.

  python -m launch.train --config configs/ood_detection/digits.py --workdir runs/digits
  python -m launch.train --config configs/ood_detection/digits.py:paper --workdir runs/paper
  python -m launch.train --config ... --workdir ... --config.seeds=2 --config.network.norm_order=after

Run it again after a crash, a kill or a full disk and it goes on from the newest checkpoint, to the same
result. On a finished run it prints the result. Several hosts: the same command on each.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxlab import config as configs
from jaxlab import experiment
from jaxlab.core import UserError
from jaxlab.report.page import write_report
from jaxlab.report.tables import print_table
from jaxlab.train.checkpoints import differences
from jaxlab.train.evaluation import Summary, environment, make_evaluate, to_json
from jaxlab.train.loop import DivergenceError, Interrupted, train
from launch import cli

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.train",
        description=__doc__,
        epilog="Any key of the config can be set: --config.method.q=0.5, --config.stages.energy.steps=100.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE[:SIZE]", required=True, help="config file; sizes: cpu (default), paper"
    )
    parser.add_argument("--workdir", metavar="DIR", required=True, help="folder of the run, made if missing")
    arguments, rest = parser.parse_known_args(argv)
    config = experiment.load_config(arguments.config, cli.overrides(rest))
    cli.set_up_jax()
    try:
        run(config, Path(arguments.workdir))
    except Interrupted as stop:
        print(f"{stop}; run the same command to go on", file=sys.stderr)
        return 128 + stop.signal_number
    return 0


def run(config: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """Trains a checked config in a folder, all stages of it, and prints and returns the result.

    Raises:
      UserError: the folder holds another config's run, is in use, or cannot be written.
      Interrupted: a signal came; checkpoints are written.
    """
    primary = jax.process_index() == 0
    with _claim(workdir) if primary else contextlib.nullcontext():
        if "stages" in config:
            _start(config, workdir, primary)
            results = {}
            for name, stage in configs.stage_configs(config).items():
                results[name] = _run_stage(stage, workdir / name, primary, stage=name)
            result = {
                **results[name],
                "step": sum(result["step"] for result in results.values()),
                "config": dict(config),
                "evals": {f"{s}/{k}": v for s, result in results.items() for k, v in result["evals"].items()},
            }
            if primary:
                cli.write_json(workdir / "result.json", result)
        else:
            result = _run_stage(config, workdir, primary)
        if primary:
            print_table(result, title=str(workdir))
            page = write_report([workdir], workdir / "report")
            Console(soft_wrap=True).print(f"report: {page}", highlight=False)
    return result


def _run_stage(config: Mapping[str, Any], workdir: Path, primary: bool, stage: str = "") -> dict[str, Any]:
    """Runs one experiment without stages, or returns the result it has."""
    _start(config, workdir, primary)
    finished = _read_result(workdir)
    if finished is not None:
        return finished
    parts = experiment.build_parts(config, stage)
    settings = parts.settings
    mesh = experiment.build_mesh(settings)
    handed_over = None
    if settings.init_from:
        try:
            source = experiment.load(workdir.parent / settings.init_from, mesh=mesh)
        except UserError as error:
            raise UserError(f"{configs.place(stage)}.init_from: {error}") from error
        if source.config["seeds"] != settings.seeds:
            raise UserError(
                f"{configs.place(stage)}.init_from: '{settings.init_from}' has {source.config['seeds']} seeds"
                f" and this run {settings.seeds}; give both the same."
            )
        handed_over = source.state.variables
    program = experiment.build_program(parts, mesh, handed_over)
    evaluate = make_evaluate(parts.make_method, parts.evaluators, mesh)
    seeds = list(range(settings.seed, settings.seed + settings.seeds))
    result = {"status": "running", "step": 0, "seeds": seeds, "config": dict(config)}
    result |= {"environment": environment(), "evals": {}}
    if primary:
        cli.write_json(workdir / "result.json", result)
    with contextlib.closing(experiment.open_checkpoints(workdir, config)) as checkpoints:
        try:
            _, evals = train(
                program,
                checkpoints,
                lambda states: evaluate(states, handed_over),
                workdir=workdir,
                title=stage or workdir.name,
                first_seed=settings.seed,
                steps=settings.steps,
                log_every=settings.log_every,
                eval_every=settings.eval_every,
                checkpoint_every=settings.checkpoint_every,
            )
        except (DivergenceError, Interrupted) as error:
            if primary:
                status = "diverged" if isinstance(error, DivergenceError) else "interrupted"
                cli.write_json(workdir / "result.json", {**result, "status": status})
            raise
    result |= {"status": "complete", "step": settings.steps, "evals": to_json(evals)}
    if primary:
        _draw(parts.evaluators, evals, workdir / "plots")
        cli.write_json(workdir / "result.json", result)
    return result


def _draw(evaluators: Mapping[str, Any], evals: Mapping[str, Summary], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, evaluator in evaluators.items():
        if evaluator.plot is None:
            continue
        prefix = f"{name}/"
        own = {key.removeprefix(prefix): s._asdict() for key, s in evals.items() if key.startswith(prefix)}
        for figure_name, figure in evaluator.plot(own).items():
            figure.savefig(folder / f"{name}_{figure_name}.png", dpi=150)


@contextlib.contextmanager
def _claim(workdir: Path) -> Iterator[None]:
    """Holds a run's folder for this process; the lock goes with the process, however it ends."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"--workdir {workdir}: cannot be written ({error.strerror}).") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise UserError(f"--workdir {workdir}: in use by {owner}; choose another, or stop it.") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()}")
        lock.flush()
        yield


def _start(config: Mapping[str, Any], workdir: Path, primary: bool) -> None:
    """Writes config.json, or checks that the run that has begun there has the same config."""
    if not primary:
        return
    if any(workdir.rglob("metrics.jsonl")):
        try:
            differing = differences(configs.read_config(workdir), config)
        except UserError as error:  # the checkpoints hold the config too
            logger.warning("%s It is written anew.", error)
            differing = []
        if differing:
            raise UserError(
                f"--workdir {workdir}: holds a run of another config: {'; '.join(differing)}."
                " Use another workdir, or the config it was started with."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    cli.write_json(workdir / "config.json", config)


def _read_result(workdir: Path) -> dict[str, Any] | None:
    """The result of a finished run, None for any other."""
    try:
        result = json.loads((workdir / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return result if result.get("status") == "complete" else None


if __name__ == "__main__":
    cli.run(main)
