"""Run folders, read from their files alone, so that a run that is still training can be read too."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlab.core import UserError

Evals = Mapping[str, Sequence[float]]  # "<evaluator>/<metric>": one number a seed, NaN where there is none


class Curve(NamedTuple):
    """A metric over training: `steps` [T] and `values` [T, seeds]."""

    steps: np.ndarray
    values: np.ndarray


class Run(NamedTuple):
    """What a run folder holds.

    Attributes:
      name: what the run is called in tables and legends.
      stage: the stage's name where this is one stage of a run, else "".
      workdir: its folder.
      status: as the run wrote it, or "unfinished" while there is no result.json.
      step: the last step it reached.
      seeds: the seeds it trained.
      config: the whole config.
      environment: versions and devices; empty while there is no result.json.
      evals: the final evaluation, or the latest periodic one until there is one; metrics that are
        curves are left out.
      history: `(split, metric)` to its curve over steps.
      plots: the pictures the run drew.
      stages: the run's stages that have begun, in order; empty where it has none.
    """

    name: str
    stage: str
    workdir: Path
    status: str
    step: int
    seeds: tuple[int, ...]
    config: dict[str, Any]
    environment: dict[str, Any]
    evals: Evals
    history: dict[tuple[str, str], Curve]
    plots: tuple[Path, ...]
    stages: "dict[str, Run]"

    def parts(self) -> "list[Run]":
        """Returns what can be measured: the stages, or the run itself where it has none."""
        return list(self.stages.values()) or [self]


def read_runs(workdirs: Sequence[str | Path]) -> list[Run]:
    """Reads run folders, each named by as much of the end of its path as tells them apart.

    Raises:
      UserError: where one of them is no run folder.
    """
    paths = list(dict.fromkeys(Path(workdir).resolve() for workdir in workdirs))
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [read_run(path, name="/".join(path.parts[-depth:])) for path in paths]


def read_run(workdir: str | Path, *, name: str | None = None, stage: str = "") -> Run:
    """Reads a run folder, finished or not; a line of its metrics that is half-written is passed over.

    Raises:
      UserError: where `workdir` is no run folder or its JSON cannot be read.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir}: not a run folder (no config.json); name the --workdir of a launch.train")
    name = workdir.resolve().name if name is None else name
    config = _read_json(workdir / "config.json")
    result = _read_json(workdir / "result.json") if (workdir / "result.json").is_file() else {}
    history = _read_history(workdir / "metrics.jsonl")
    stages = {
        key: read_run(workdir / key, name=name, stage=key)
        for key in config.get("stages") or {}
        if (workdir / key / "config.json").is_file()
    }
    latest = {metric: list(curve.values[-1]) for (split, metric), curve in history.items() if split == "eval"}
    last_step = max((int(curve.steps[-1]) for curve in history.values()), default=0)
    first = config.get("seed") or 0
    return Run(
        name=name,
        stage=stage,
        workdir=workdir,
        status=result.get("status", "unfinished"),
        step=max(result.get("step", 0), last_step),  # a result written at the start says 0
        seeds=tuple(result.get("seeds", range(first, first + (config.get("seeds") or 1)))),
        config=config,
        environment=result.get("environment", {}),
        evals=evals_by_stage(result).get("") or latest,
        history=history,
        plots=tuple(sorted((workdir / "plots").glob("*.png"))),
        stages=stages,
    )


def evals_by_stage(result: Mapping[str, Any]) -> dict[str, Evals]:
    """Returns the scalar metrics of a result.json by stage; the one stage of a run without any is ""."""
    scalars = {name: _numbers(entry["values"]) for name, entry in result.get("evals", {}).items()}
    scalars = {name: values for name, values in scalars.items() if values}
    stages = result.get("config", {}).get("stages")
    if not stages:
        return {"": scalars}
    return {
        stage: {n.removeprefix(f"{stage}/"): v for n, v in scalars.items() if n.startswith(f"{stage}/")}
        for stage in stages
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields `("section.key", value)` for every value of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); run launch.train there again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; run launch.train there again")
    return content


def _read_history(path: Path) -> dict[tuple[str, str], Curve]:
    rows: dict[tuple[str, str], dict[int, list[float]]] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ()
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # the run is writing this line, or was killed while it did
            continue
        if not isinstance(record, dict) or "step" not in record:
            continue
        for metric, value in record.items():
            if values := _numbers(value):
                # A resumed run repeats the steps since its checkpoint: the later line stands.
                rows.setdefault((record.get("split", "train"), metric), {})[record["step"]] = values
    return {
        key: Curve(np.array(sorted(by_step)), np.array([by_step[step] for step in sorted(by_step)]))
        for key, by_step in rows.items()
    }


def _numbers(value: Any) -> list[float] | None:
    """Returns a list of numbers with NaN for null, or None for anything else, a list of curves included."""
    if not isinstance(value, list) or not all(v is None or isinstance(v, int | float) for v in value):
        return None
    return [math.nan if v is None else float(v) for v in value]
