"""Evaluates a checkpoint of a run, finished or still training, and prints the table that launch.train prints.

  python -m launch.evaluate --workdir runs/digits
  python -m launch.evaluate --workdir runs/digits/energy --step 95 --out energy_95.json
  python -m launch.evaluate --workdir runs/digits/energy --threshold 0.95

Every evaluator of the run's config on every seed; of a run of stages, every stage that has a checkpoint.
Of a finished run's last step the figures are those of its result.json, to the bit where the devices are the
same. The run's folder is only read, but for --threshold: for each out-of-distribution score it writes the
value that this share of the in-distribution examples stays at or below, seed by seed, into thresholds.json
there. Above it an example is to be taken for out-of-distribution.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from jaxlab import config as configs
from jaxlab import experiment
from jaxlab.config import Settings
from jaxlab.core import Evaluator, UserError, build
from jaxlab.report.tables import print_table
from jaxlab.train import devices
from jaxlab.train.evaluation import environment, make_evaluate, to_json
from launch import cli

Step = int | Literal["best"] | None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--workdir", metavar="DIR", required=True, help="folder of a run, or of one of its stages"
    )
    parser.add_argument(
        "--step",
        metavar="N|best",
        type=_step,
        help="which checkpoint: its step, or the best by config.best_metric; the newest if left out",
    )
    parser.add_argument(
        "--out", metavar="FILE.json", help="also write the figures, in the form of result.json"
    )
    parser.add_argument(
        "--threshold",
        metavar="TPR",
        type=_share,
        help="write the scores' thresholds that keep this share of in-distribution examples, such as 0.95",
    )
    arguments = parser.parse_args(argv)
    workdir, out = Path(arguments.workdir), arguments.out and Path(arguments.out)
    config = configs.read_config(workdir)
    if "stages" in config and isinstance(arguments.step, int):
        folders = ", ".join(str(workdir / stage) for stage in config["stages"])
        raise UserError(f"--step {arguments.step}: a run of stages; give --workdir one of: {folders}.")
    if out:
        _check_out(out)
    cli.set_up_jax()
    function = _evaluate_stages if "stages" in config else evaluate
    result = function(workdir, arguments.step, arguments.threshold)
    print_table(result, title=str(workdir))
    if out:
        cli.write_json(out, result)
    return 0


def evaluate(workdir: Path, step: Step = None, tpr: float | None = None) -> dict[str, Any]:
    """Evaluates a run without stages, or a stage, with a progress bar on stderr where that is a terminal.

    Args:
      workdir: its folder.
      step: which checkpoint, as for `experiment.load`.
      tpr: if given, the share that thresholds keep, which are written to the folder.

    Returns:
      What result.json has: `step`, `seeds`, `config`, `environment`, `definitions` and `evals`.

    Raises:
      UserError: no run there, no such checkpoint, or no evaluator that has thresholds.
    """
    run = experiment.load(workdir, step)
    settings = configs.settings_of(run.config)
    if tpr is not None:
        run = _with_tpr(run, workdir, tpr)
    mesh = _mesh(settings)
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"{workdir.name}: checkpoint of step {run.step}", markup=False, highlight=False)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("evaluating", total=settings.seeds * len(run.evaluators))
        evaluators = {
            name: _and_then(evaluator, lambda: progress.advance(task))
            for name, evaluator in run.evaluators.items()
        }
        states = devices.put(run.state, devices.over_seeds(mesh))
        evals = to_json(make_evaluate(run.method.predict, evaluators, mesh)(states))
    if tpr is not None:
        _write_thresholds(workdir / "thresholds.json", run.step, tpr, evals)
    return {
        "step": run.step,
        "seeds": list(range(settings.seed, settings.seed + settings.seeds)),
        "config": run.config,
        "environment": environment(),
        "definitions": run.definitions,
        "evals": evals,
    }


def _with_tpr(run: experiment.Run, workdir: Path, tpr: float) -> experiment.Run:
    """The run with evaluators whose thresholds keep another share."""
    sections = run.config["evaluators"]
    chosen = [name for name, definition in run.definitions.items() if "tpr" in definition]
    if not chosen:
        raise UserError(
            f"--threshold: {workdir} has no evaluator with thresholds; ood_detection.detection has."
        )
    data_dir = run.config["data_dir"] or None
    changed = {
        name: build(
            "evaluator", {**sections[name], "tpr": tpr}, f"config.evaluators.{name}", data_dir=data_dir
        )
        for name in chosen
    }
    definitions = {name: {**run.definitions[name], "tpr": tpr} for name in chosen}
    return run._replace(evaluators=run.evaluators | changed, definitions=run.definitions | definitions)


def _write_thresholds(path: Path, step: int, tpr: float, evals: Mapping[str, Any]) -> None:
    thresholds = {
        name.replace("/threshold/", "/"): [value for (value,) in entry["values"]]
        for name, entry in evals.items()
        if "/threshold/" in name
    }
    cli.write_json(path, {"step": step, "tpr": tpr, "thresholds": thresholds})
    print(f"thresholds: {path}")


def _evaluate_stages(workdir: Path, step: Step, tpr: float | None) -> dict[str, Any]:
    """Evaluates the stages that have a checkpoint, into one result as that of a whole run."""
    config = configs.read_config(workdir)
    begun = [stage for stage in config["stages"] if _has_checkpoint(workdir / stage)]
    if not begun:
        raise UserError(f"{workdir}: no stage has a checkpoint yet; start the run with launch.train.")
    results = {stage: evaluate(workdir / stage, step, tpr) for stage in begun}
    return {
        **results[begun[-1]],
        "definitions": {stage: result["definitions"] for stage, result in results.items()},
        "step": sum(result["step"] for result in results.values()),
        "config": config,
        "evals": {f"{s}/{k}": v for s, result in results.items() for k, v in result["evals"].items()},
    }


def _has_checkpoint(workdir: Path) -> bool:
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def _mesh(settings: Settings) -> Mesh:
    """The devices as the run has them, for the same bits; one where they are not here."""
    try:
        return experiment.build_mesh(settings)
    except UserError:
        return devices.make_mesh(1, 1, seeds=settings.seeds, batch_size=settings.batch_size)


def _and_then(evaluator: Evaluator, done: Callable[[], None]) -> Evaluator:
    def evaluate(predict: Callable, state: Any) -> dict[str, Any]:
        metrics = evaluator.evaluate(predict, state)
        done()
        return metrics

    return evaluator._replace(evaluate=evaluate)


def _check_out(out: Path) -> None:
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"--out {out}: give a file's name in a folder that exists.")
    runs = [folder for folder in out.resolve().parents if (folder / "config.json").exists()]
    if runs:
        raise UserError(f"--out {out}: inside the run {runs[-1]}, which is only read; choose another place.")


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, got {text!r}")
    return share


def _step(text: str) -> Step:
    if text == "best":
        return "best"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected the step of a checkpoint, or best, got {text!r}")
    return int(text)


if __name__ == "__main__":
    cli.run(main)
