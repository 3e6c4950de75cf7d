"""Trains what a config describes, from wherever an earlier call of the same command stopped.

  python -m launch.train --config configs/ood_detection/digits.py --workdir runs/digits
  python -m launch.train --config configs/ood_detection/digits.py:paper --workdir runs/paper
  python -m launch.train --config ... --workdir ... --config.seeds=2 --config.network.order=swap

Run it again after a crash, a kill or a full disk and it goes on from the newest checkpoint, to the same
result. On a finished run it prints the result. Several hosts: the same command on each.
"""

import argparse
import contextlib
import fcntl
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import chex
import jax
from rich.console import Console

from jaxlab import config as configs
from jaxlab import experiment
from jaxlab.core import UserError
from jaxlab.report.page import write_report
from jaxlab.report.tables import print_table
from jaxlab.train import devices
from jaxlab.train.checkpoints import differences
from jaxlab.train.evaluation import Summary, environment, make_evaluate, to_json
from jaxlab.train.loop import DivergenceError, Interrupted, noting_signals, train
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
    stages = configs.stage_configs(config) or {"": config}
    devices.spread_over_cores(max(stage["seeds"] for stage in stages.values()))
    try:
        run(config, Path(arguments.workdir))
    except Interrupted as stop:
        print(f"{stop}; run the same command to go on", file=sys.stderr)
        jax.distributed.shutdown()  # all hosts have stopped at this step: none leaves before the others
        return 128 + stop.signal_number
    return 0


def run(config: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """Trains a checked config in a folder, all stages of it, and prints and returns the result.

    Raises:
      UserError: the folder holds another config's run, is in use, or cannot be written.
      Interrupted: a signal came; checkpoints are written.
    """
    stages = configs.stage_configs(config)
    with contextlib.ExitStack() as stack:
        devices.on_primary(lambda: stack.enter_context(_claim(workdir)))
        stop_signal = stack.enter_context(noting_signals())
        devices.on_primary(
            lambda: _begin({workdir: config} | {workdir / name: stage for name, stage in stages.items()})
        )
        if not stages:
            result = _run_stage(config, workdir, stop_signal)
        else:
            if not all(experiment.read_result(workdir / name) for name in stages):
                experiment.check_stages(config)
            results = {}
            for name in stages:
                results[name] = _run_stage(config, workdir, stop_signal, name)
                if stop_signal() and name != list(stages)[-1]:
                    raise Interrupted(stop_signal(), results[name]["step"])
            result = {
                **results[name],
                "step": sum(result["step"] for result in results.values()),
                "config": dict(config),
                "definitions": {name: result["definitions"] for name, result in results.items()},
                "evals": {f"{s}/{k}": v for s, result in results.items() for k, v in result["evals"].items()},
            }
            devices.on_primary(lambda: cli.write_json(workdir / "result.json", result))
        devices.on_primary(lambda: _show(result, workdir))
    return result


def _run_stage(
    config: Mapping[str, Any], workdir: Path, stop_signal: Callable[[], int], stage: str = ""
) -> dict[str, Any]:
    """Runs one stage, or a config without stages, or returns the result it has."""
    folder = workdir / stage
    finished = experiment.read_result(folder)
    if finished is not None:
        return finished
    stage_config = configs.stage_configs(config)[stage] if stage else config
    parts = experiment.build_parts(stage_config, stage)
    settings = parts.settings
    mesh = experiment.build_mesh(settings, stage)

    def take_over(source: str) -> chex.ArrayTree:
        source_folder = folder.parent / source
        try:
            return experiment.final_variables(source_folder, mesh, settings, stage)
        except UserError as error:
            if not stage:
                raise UserError(f"config.init_from: {error}") from error
            logger.warning("%s Stage %s is taken up again before it.", error, source)
            devices.on_primary(lambda: (source_folder / "result.json").unlink(missing_ok=True))
            _run_stage(config, workdir, stop_signal, source)
            return experiment.final_variables(source_folder, mesh, settings, stage)

    handed_over = {name: take_over(source) for name, source in settings.sources.items()}
    program = experiment.build_program(parts, mesh, stage=stage, handed_over=handed_over or None)
    seeds = list(range(settings.seed, settings.seed + settings.seeds))
    result = {"status": "running", "step": 0, "seeds": seeds, "config": dict(stage_config)}
    result |= {"environment": environment(), "definitions": parts.definitions, "evals": {}}

    def write_result(**changes: Any) -> None:
        result.update(changes)
        devices.on_primary(lambda: cli.write_json(folder / "result.json", result))

    write_result()
    with contextlib.closing(experiment.open_checkpoints(folder, stage_config)) as checkpoints:
        try:
            _, evals = train(
                program,
                checkpoints,
                make_evaluate(parts.make_method(None).predict, parts.evaluators, mesh),
                workdir=folder,
                title=stage or workdir.name,
                first_seed=settings.seed,
                steps=settings.steps,
                log_every=settings.log_every,
                eval_every=settings.eval_every,
                checkpoint_every=settings.checkpoint_every,
                save_evaluated=bool(settings.best_metric),
                stop_signal=stop_signal,
            )
        except (DivergenceError, Interrupted) as error:
            status = "diverged" if isinstance(error, DivergenceError) else "interrupted"
            write_result(status=status, step=error.step)
            raise
    devices.on_primary(lambda: _draw(parts.evaluators, evals, folder / "plots"))
    write_result(status="complete", step=settings.steps, evals=to_json(evals))
    return result


def _show(result: Mapping[str, Any], workdir: Path) -> None:
    print_table(result, title=str(workdir))
    page = write_report([workdir], workdir / "report")
    Console(soft_wrap=True).print(f"report: {page}", highlight=False, markup=False)


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


def _begin(folders: Mapping[Path, Mapping[str, Any]]) -> None:
    """Writes each folder's config.json, unless a run of another config has begun in one of them."""
    for folder, config in folders.items():
        if not (folder / "metrics.jsonl").exists():
            continue
        try:
            differing = differences(configs.read_config(folder), config)
        except UserError as error:  # the checkpoints hold the config too
            logger.warning("%s It is written anew.", error)
            continue
        if differing:
            raise UserError(
                f"--workdir {folder}: holds a run of another config: {'; '.join(differing)}."
                " Use another workdir, or the config it was started with."
            )
    for folder, config in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        cli.write_json(folder / "config.json", config)


if __name__ == "__main__":
    cli.run(main)
