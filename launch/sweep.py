"""Trains a config many times: on a grid of values, on values drawn at random, or on both.

  python -m launch.sweep --config configs/ood_detection/digits.py --workdir runs/sweep \\
      --grid config.seed=0,10 --grid 'config.network.hidden=[64],[128,128]'
  python -m launch.sweep --config ... --workdir ... --random 20 --sweep_seed 0 \\
      --sample 'config.optimizer.learning_rate=loguniform(1e-4,1e-1)' \\
      --sample 'config.batch_size=choice(32,64)'
  python -m launch.sweep ... --slurm | sbatch --gres=gpu:1 --time=4:00:00

The runs are all combinations of the grids' values, each with every random draw. They are trained one after
the other, each in a folder of --workdir named by its values; a table and a report of all complete runs stand
at the end. Run the same command again and it goes on where it stopped: complete runs are passed over. With
another grid, or more draws, it adds runs.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlab import experiment
from jaxlab.core import UserError
from jaxlab.core.errors import nearest
from jaxlab.report.page import write_report
from jaxlab.report.runs import read_run, read_runs
from jaxlab.report.tables import print_table
from jaxlab.train.checkpoints import differences
from launch import cli

DISTRIBUTIONS = ("uniform(low,high)", "loguniform(low,high)", "randint(low,high)", "choice(value,...)")

MAX_NAME = 120  # characters of a folder's name; file systems take 255 bytes

Overrides = dict[str, str]  # dotted key → value as written on a command line


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.sweep",
        description=__doc__,
        epilog="--config.key=value sets a key in all runs, as in launch.train.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE[:SIZE]", required=True, help="config file; sizes: cpu (default), paper"
    )
    parser.add_argument(
        "--workdir", metavar="DIR", required=True, help="folder of the sweep, made if missing"
    )
    parser.add_argument(
        "--grid",
        metavar="config.KEY=VALUE,...",
        action="append",
        default=[],
        help="values of a key; commas in brackets or quotes do not separate; may be given several times",
    )
    parser.add_argument("--random", metavar="N", type=int, default=0, help="how many random draws")
    parser.add_argument(
        "--sample",
        metavar="config.KEY=DISTRIBUTION",
        action="append",
        default=[],
        help=f"draw a key from one of {', '.join(DISTRIBUTIONS)}; randint includes high",
    )
    parser.add_argument("--sweep_seed", metavar="N", type=int, default=0, help="seed of the draws (0)")
    parser.add_argument(
        "--slurm",
        action="store_true",
        help="train nothing; print a SLURM array script of the runs left to do",
    )
    arguments, rest = parser.parse_known_args(argv)
    fixed = cli.overrides(rest)
    grid = {key: split(values, f"--grid {key}") for key, values in _keys("--grid", arguments.grid).items()}
    samples = _keys("--sample", arguments.sample)
    if twice := (grid.keys() & samples.keys()) | (fixed.keys() & (grid.keys() | samples.keys())):
        raise UserError(f"config.{min(twice)}: given more than once; fix it, or --grid or --sample it.")
    if not grid and not samples:
        raise UserError("--grid: nothing to sweep over; give --grid, or --random with --sample.")
    if (arguments.random > 0) != bool(samples):
        raise UserError("--random: give a number of draws together with what to --sample.")

    workdir = Path(arguments.workdir)
    overrides = combine(grid, samples, draws=arguments.random, seed=arguments.sweep_seed)
    config = experiment.load_config(arguments.config, fixed)
    for values in overrides.values():
        experiment.load_config(arguments.config, {**fixed, **values})
    search = {"grid": grid, "sample": samples, "random": arguments.random, "sweep_seed": arguments.sweep_seed}
    recorded = _record(workdir, arguments.config, config, search, overrides)
    commands = {
        name: _train_command(arguments.config, workdir / name, {**fixed, **values})
        for name, values in overrides.items()
    }
    if arguments.slurm:
        left = [command for name, command in commands.items() if not _is_complete(workdir / name)]
        if left:
            print(slurm_script(left, workdir.absolute()), end="")
        else:
            print("all runs are complete: nothing is left to submit", file=sys.stderr)
        return 0

    failed, stopped = _train_all(commands, workdir)
    _compare([workdir / name for name in recorded if _is_complete(workdir / name)], workdir)
    for name, status in failed.items():
        print(f"failed with exit status {status}: {shlex.join(commands[name])}", file=sys.stderr)
    if stopped:
        print(f"stopped by {signal.Signals(stopped).name}; run the same command to go on", file=sys.stderr)
        return 128 + stopped
    if failed:
        print(
            f"{len(failed)} of {len(commands)} runs failed; the same command tries them again",
            file=sys.stderr,
        )
    return 1 if failed else 0


def split(text: str, where: str) -> list[str]:
    """Splits at the commas that stand in no brackets and no quotes.

    Raises:
      UserError: an empty value, or brackets or quotes that are not closed; `where` names the place.
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = quote.replace(character, "")
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append("")
            continue
        elif character.isspace() and depth:  # [8, 8] is [8,8], by the same name
            continue
        parts[-1] += character
    if depth or quote:
        raise UserError(f"{where}: brackets or quotes are not closed in {text}.")
    parts = [part.strip() for part in parts]
    if not all(parts):
        raise UserError(f"{where}: an empty value in '{text}'; write VALUE,VALUE,... ('' for an empty text).")
    return parts


def quantile_function(text: str, where: str) -> Callable[[float], str]:
    """The quantile function of a distribution such as "loguniform(1e-4,1e-1)".

    Args:
      text: one of `DISTRIBUTIONS`.
      where: the place of the text, for messages.

    Returns:
      From u in [0, 1) to a value as written on a command line, floats with six significant digits.

    Raises:
      UserError: no such distribution, or arguments that do not fit it.
    """
    match = re.fullmatch(r"(\w+)\((.+)\)", text.strip())
    name, arguments = (match[1], split(match[2], where)) if match else (text, [])
    known = [distribution.partition("(")[0] for distribution in DISTRIBUTIONS]
    if match is None or name not in known:
        raise UserError(
            f"{where}: no distribution '{text}'.{nearest(name, known)} {', '.join(DISTRIBUTIONS)}."
        )
    if name == "choice":
        return lambda u: arguments[int(u * len(arguments))]
    try:
        low, high = map(int if name == "randint" else float, arguments)
    except ValueError as error:
        kind = "whole numbers" if name == "randint" else "numbers"
        raise UserError(f"{where}: {name} takes two {kind}, got '{text}'.") from error
    lowest = 0 if name == "loguniform" else -math.inf
    if not lowest < low < high < math.inf:
        raise UserError(f"{where}: {name} needs {lowest} < low < high, got '{text}'.")
    if name == "randint":
        return lambda u: str(low + int(u * (high - low + 1)))
    if name == "loguniform":
        return lambda u: f"{low * (high / low) ** u:.6g}"
    return lambda u: f"{low + u * (high - low):.6g}"


def combine(
    grid: Mapping[str, Sequence[str]], samples: Mapping[str, str], *, draws: int, seed: int
) -> dict[str, Overrides]:
    """The overrides of every run, by the run's name.

    Args:
      grid: key → values; all their combinations are made.
      samples: key → distribution.
      draws: how many times to draw from all distributions; each draw goes with each combination.
      seed: of the draws; the first n are the same however many there are.

    Raises:
      UserError: a distribution is wrong.
    """
    quantiles = {key: quantile_function(samples[key], f"--sample config.{key}") for key in sorted(samples)}
    rng = random.Random(seed)  # of whose methods only random() is the same in all versions of Python
    drawn = [{key: quantile(rng.random()) for key, quantile in quantiles.items()} for _ in range(draws)]
    combinations = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    runs = [dict(sorted({**values, **draw}.items())) for values in combinations for draw in drawn or [{}]]
    return {run_name(run): run for run in runs}


def run_name(overrides: Overrides) -> str:
    """The name of a run's folder: "method.q=0.5,seed=1", with a hash where that is too long or has odd
    characters."""
    text = ",".join(f"{key}={value}" for key, value in overrides.items())
    name = re.sub(r"[^\w.=,+()\[\]-]+", "_", text, flags=re.ASCII)[:MAX_NAME]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def slurm_script(commands: Sequence[Sequence[str]], workdir: Path) -> str:
    """A script for sbatch: an array with one task a command, logging into `workdir` (an absolute path)."""
    log = f"{workdir}/slurm-".replace("%", "%%") + "%A_%a.out"
    cases = "".join(f"  {i}) exec {shlex.join(command)} ;;\n" for i, command in enumerate(commands))
    return f"""#!/bin/bash
#SBATCH --job-name={shlex.quote(workdir.name)}
#SBATCH --array=0-{len(commands) - 1}
#SBATCH --output={shlex.quote(log)}
#SBATCH --open-mode=append
#SBATCH --requeue
# Two minutes before the time limit the run is told to write a checkpoint; submitted again it goes on.
#SBATCH --signal=B:TERM@120
cd {shlex.quote(os.getcwd())} || exit
case "$SLURM_ARRAY_TASK_ID" in
{cases}esac
"""


def _keys(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Reads "config.KEY=VALUE" as {KEY: VALUE}."""
    found: dict[str, str] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if not key.startswith("config.") or not value:
            raise UserError(f"{option} {text}: write {option} config.KEY=..., see --help.")
        key = key.removeprefix("config.")
        if key in found:
            raise UserError(f"{option} {text}: config.{key} is given more than once.")
        found[key] = value
    return found


def _record(
    workdir: Path,
    config_file: str,
    config: Mapping[str, Any],
    search: Mapping[str, Any],
    runs: Mapping[str, Overrides],
) -> list[str]:
    """Adds runs to the folder's sweep.json; returns the names of all that are in it."""
    if (workdir / "config.json").exists():
        raise UserError(f"--workdir {workdir}: holds a run, not a sweep; use another.")
    path = workdir / "sweep.json"
    sweep = {"config_file": config_file, "config": config, "searches": [], "runs": {}}
    if path.exists():
        try:
            sweep = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not readable as JSON ({error}); delete it, the runs stay.") from error
        if differing := differences(sweep["config"], config):
            raise UserError(
                f"--workdir {workdir}: holds a sweep of another config: {'; '.join(differing)}."
                " Use another workdir, or the config it was started with."
            )
    if search not in sweep["searches"]:
        sweep["searches"].append(search)
    sweep["runs"] |= runs
    workdir.mkdir(parents=True, exist_ok=True)
    cli.write_json(path, sweep)
    return list(sweep["runs"])


def _train_command(config_file: str, workdir: Path, overrides: Overrides) -> list[str]:
    command = [sys.executable, "-m", "launch.train", "--config", config_file, "--workdir", str(workdir)]
    return command + [f"--config.{key}={value}" for key, value in overrides.items()]


def _is_complete(workdir: Path) -> bool:
    try:
        return read_run(workdir).status == "complete"
    except UserError:  # there is none yet, or launch.train mends it
        return False


def _train_all(commands: Mapping[str, Sequence[str]], workdir: Path) -> tuple[dict[str, int], int]:
    """Trains what is not complete; returns the exit status of each run that failed, and the signal that
    stopped the sweep or 0."""
    failed: dict[str, int] = {}
    for number, (name, command) in enumerate(commands.items(), start=1):
        complete = _is_complete(workdir / name)
        print(f"[{number}/{len(commands)}] {name}{': complete' if complete else ''}", flush=True)
        if complete:
            continue
        status, stopped = _run(command)
        if stopped:
            return failed, stopped
        if status:
            failed[name] = status
    return failed, 0


def _run(command: Sequence[str]) -> tuple[int, int]:
    """Runs a command to its end; returns its exit status and the signal that came meanwhile, or 0.

    SIGINT and SIGTERM are passed on, so that the run writes a checkpoint before it stops.
    """
    received = 0
    process = subprocess.Popen(command)

    def pass_on(number: int, frame: types.FrameType | None) -> None:
        nonlocal received
        del frame
        received = number
        process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait(), received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _compare(workdirs: Sequence[Path], sweep: Path) -> None:
    """Prints a table of complete runs and, of several, writes a report."""
    if not workdirs:
        return
    parts = [part for run in read_runs(workdirs) for part in run.parts()]
    rows = {" · ".join(filter(None, [part.name, part.stage])): part.evals for part in parts}
    # A table has a row for each stage of a result: here each run is one.
    evals = {f"{row}/{name}": {"values": v} for row, metrics in rows.items() for name, v in metrics.items()}
    print_table({"config": {"stages": rows}, "evals": evals}, title=str(sweep))
    if len(workdirs) > 1:
        print(f"report: {write_report(workdirs, sweep / 'report')}")


if __name__ == "__main__":
    cli.run(main)
