"""Kills runs with SIGKILL at random moments, damages their checkpoints, and compares them to the bit.

  make stress                                                 every family, both streams, 100 kills
  python -m tests.stress --kills 10 --families lff lp_ft --streams host --seed 1

Each case is a family of `tests/stress_config.py` and a stream. It is run undisturbed, then with kills: a quarter
at a random time of the start-up, the others shortly after a random number of further lines of metrics.jsonl, so
that they spread over the run on any machine. Where it ends before all of its kills have come, it is run anew.
Every third kill damages a checkpoint too, of those that a restart may read: that of a finished stage from
which no other starts is never read again. Exit status 0 if every run ended with the same metrics.jsonl,
result.json and final states as the undisturbed one, 1 if one did not.
"""

import argparse
import itertools
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxlab import config as configs
from jaxlab import experiment
from tests.launch import runs
from tests.stress_config import FAMILIES

DAMAGES = ("truncate", "zero", "delete", "swap")
LOGGED = re.compile(r"(\S+  step \d+)/\d+  ")
HANGS = 1800  # seconds, many times what a run takes


class Outcome(NamedTuple):
    """What became of a case; `repeated` steps were trained more than once, by the lines of the log."""

    runs: int
    kills: int
    damages: int
    repeated: int
    failures: list[str]


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=100, help="over all cases (100)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and damages (0)")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, metavar="FAMILY")
    parser.add_argument("--streams", nargs="+", choices=("device", "host"), default=("device", "host"))
    arguments = parser.parse_args(argv)
    cases = list(itertools.product(arguments.families, arguments.streams))
    if ("in_context", "host") in cases:  # its prompts are generated on the device
        cases.remove(("in_context", "host"))
    if not cases:
        parser.error("--streams: in_context has none on the host")
    rng = np.random.default_rng(arguments.seed)
    numbers = np.array_split(range(arguments.kills), len(cases))
    outcomes = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    folder = Path(tempfile.mkdtemp(prefix="jaxlab-stress-"))
    with Progress(*columns) as progress:
        task = progress.add_task("", total=arguments.kills)

        def tell(line, kills=1):
            progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
            progress.advance(task, kills)

        for case, kills in zip(cases, numbers):
            progress.update(task, description=" ".join(case))
            outcomes[case] = attack(*case, kills.tolist(), rng, folder / "-".join(case), tell)
            tell(f"{' '.join(case)}: {verdict(outcomes[case])}", kills=len(kills) - outcomes[case].kills)
        progress.console.print(table(outcomes))
    if any(outcome.failures for outcome in outcomes.values()):
        print(f"the runs are kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def attack(family, where, kills, rng, folder, tell):
    """Runs a case undisturbed, then with kills of these numbers, and compares."""
    config = f"{runs.ROOT / 'tests' / 'stress_config.py'}:{family},{where}"
    undisturbed = folder / "undisturbed"
    began = time.monotonic()
    process = start(config, undisturbed)
    wait_for_lines(1, undisturbed, process)
    startup = time.monotonic() - began
    _, errors = runs.end_or_kill(process, HANGS)
    if process.returncode:
        return Outcome(1, 0, 0, 0, [f"undisturbed: {how_it_ended(process, errors)}"])
    lines = lines_written(undisturbed)
    pace = (time.monotonic() - began - startup) / lines
    ahead = 2 * lines // max(len(kills), 1)  # in the mean the kills reach the end

    ended = killed = damages = repeated = 0
    failures, due = [], []
    while (killed < len(kills) or not ended) and not failures:
        workdir, logged = folder / f"run-{ended}", []
        while True:
            process = start(config, workdir)
            if killed == len(kills):
                seconds = HANGS
            elif rng.random() < 1 / 4:
                seconds = rng.uniform(0, startup)
            else:
                wait_for_lines(lines_written(workdir) + rng.integers(1, ahead + 2), workdir, process)
                seconds = rng.uniform(0, 2 * pace)
            output, errors = runs.end_or_kill(process, seconds)
            logged += [" ".join(line.split()) for line in LOGGED.findall(output)]
            if process.returncode != -signal.SIGKILL or killed == len(kills):
                break
            number = kills[killed]
            killed += 1
            if number % 3 == 2:
                due.append(DAMAGES[number // 3 % len(DAMAGES)])
            line = f"{family} {where}: kill {number + 1} at {logged[-1] if logged else 'no step'}"
            if due and (damaged := damage(due[0], in_use(config, workdir), rng)):
                line += f", {due.pop(0)} {damaged.relative_to(workdir)}"
                damages += 1
            tell(line)
        ended += 1
        if process.returncode:
            failures.append(how_it_ended(process, errors))
            continue
        failures += runs.differing(workdir, undisturbed)
        needed = sum(path.read_text().count('"split": "train"') for path in workdir.rglob("metrics.jsonl"))
        repeated += (len(logged) - needed) * experiment.load_config(config)["log_every"]
    return Outcome(ended, killed, damages, repeated, failures)


def start(config, workdir):
    environment = runs.environment(
        devices=None,
        PYTHONUNBUFFERED="1",  # or lines that a killed run has written would be lost
        JAX_COMPILATION_CACHE_DIR=f"{workdir}.compiled",  # its own: kills come while it is filled too
    )
    return runs.start(config, workdir, env=environment)


def wait_for_lines(number, workdir, process):
    """Returns once a run has written so many lines of metrics, or has ended, or hangs."""
    began = time.monotonic()
    while process.poll() is None and lines_written(workdir) < number and time.monotonic() < began + HANGS:
        time.sleep(0.02)


def lines_written(workdir):
    logs = [*workdir.glob("metrics.jsonl"), *workdir.glob("*/metrics.jsonl")]  # of the run, or of its stages
    return sum(path.read_bytes().count(b"\n") for path in logs)


def how_it_ended(process, errors):
    if process.returncode == -signal.SIGKILL:
        return f"did not end in {HANGS} s"
    return f"exit status {process.returncode}: {(errors.strip() or 'no error').splitlines()[-1]}"


def in_use(config, workdir):
    """The checkpoints that a restart may read, those of each stage in order."""
    whole = experiment.load_config(config)
    stages = configs.stage_configs(whole) or {"": whole}
    unfinished = [name for name in stages if experiment.read_result(workdir / name) is None]
    sources = {s for name in unfinished for s in configs.settings_of(stages[name]).sources.values()}
    found = [
        [path for path in (workdir / name / "checkpoints").glob("*") if path.name.isdigit()]
        for name in stages
        if name in unfinished or name in sources
    ]
    found = [sorted(checkpoints, key=lambda path: int(path.name)) for checkpoints in found]
    return [checkpoints for checkpoints in found if checkpoints]


def damage(kind, stages, rng):
    """Damages the newest checkpoint of a stage, in some or all of its files; returns it, or None if there is none.

    Args:
      kind: one of DAMAGES.
      stages: the checkpoints of each stage.
      rng: chooses the stage and the files.
    """
    stages = [checkpoints for checkpoints in stages if len(checkpoints) > (kind == "swap")]
    if not stages:
        return None
    *others, newest = stages[rng.integers(len(stages))]
    if kind == "swap":
        aside = newest.with_name("aside")
        newest.rename(aside)
        others[-1].rename(newest)
        aside.rename(others[-1])
        return newest
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    for path in rng.choice(files, rng.integers(1, len(files) + 1), replace=False):
        if kind == "truncate":
            os.truncate(path, rng.integers(path.stat().st_size + 1))
        elif kind == "zero":
            path.write_bytes(bytes(path.stat().st_size))
        else:
            path.unlink()
    return newest


def table(outcomes):
    shown = Table("family", "stream", "runs", "kills", "damaged", "steps repeated", "result")
    for case, outcome in outcomes.items():
        shown.add_row(*case, *map(str, outcome[:4]), verdict(outcome))
    *totals, failures = (sum(column, start=type(column[0])()) for column in zip(*outcomes.values()))
    shown.add_section()
    shown.add_row("all", "", *map(str, totals), "differences" if failures else "same bits")
    return shown


def verdict(outcome):
    return "; ".join(outcome.failures) or "same bits"


if __name__ == "__main__":
    sys.exit(main())
