"""Of stages that differ in their learning rate alone, shows the one that does best on a metric.

  python -m launch.select_stages runs/transfer --metric shift/validation_accuracy

DIR is the folder of a finished run whose stages are named METHOD_lr_RATE. For each method the stage is taken
whose mean of the metric over seeds is largest, the first of several; other stages are shown as they are. The
metric should be of validation data in distribution: what is shown of test data was then not chosen on it.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlab import experiment
from jaxlab.core import UserError
from jaxlab.core.errors import nearest
from jaxlab.core.statistics import mean_and_stderr
from jaxlab.methods.transfer.evaluation import select_on
from jaxlab.report.runs import evals_by_stage
from jaxlab.report.tables import print_table
from launch import cli


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.select_stages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("workdir", metavar="DIR", help="folder of a finished run with stages")
    parser.add_argument(
        "--metric", metavar="EVALUATOR/METRIC", required=True, help="what to select on; larger is better"
    )
    arguments = parser.parse_args(argv)
    result = experiment.read_result(Path(arguments.workdir))
    if result is None:
        raise UserError(f"{arguments.workdir}: no finished run here; train it with launch.train first.")
    chosen = select(result, arguments.metric)
    evals = {
        f"{label}/{metric}": {"values": values}
        for label, stage in chosen.items()
        for metric, values in evals_by_stage(result)[stage].items()
    }
    shown = {"config": {"stages": dict.fromkeys(chosen)}, "evals": evals}
    print_table(shown, title=f"{arguments.workdir}, learning rates by {arguments.metric}")
    return 0


def select(result: Mapping[str, Any], metric: str) -> dict[str, str]:
    """The stages to show, in order: what each is called in the table → its name.

    Args:
      result: of a run with stages, as in its result.json.
      metric: "<evaluator>/<metric>" that each stage with a learning rate in its name has.

    Raises:
      UserError: no such stage, or a stage without the metric.
    """
    candidates: dict[str, list[dict[str, Any]]] = {}
    for stage, evals in evals_by_stage(result).items():
        method, named, rate = stage.partition("_lr_")
        row = {"stage": stage, "rate": rate}
        if named:
            if metric not in evals:
                raise UserError(f"--metric {metric}: stage '{stage}' has none.{nearest(metric, evals)}")
            row[metric] = float(mean_and_stderr(evals[metric])[0])
        candidates.setdefault(method, []).append(row)
    if not any(row["rate"] for rows in candidates.values() for row in rows):
        raise UserError("no stage is named METHOD_lr_RATE; there is nothing to select.")
    chosen = {}
    for method, rows in candidates.items():
        best = select_on(rows, metric) if metric in rows[0] else rows[0]
        label = f"{method} at {best['rate']}" if best["rate"] else method
        chosen[label] = best["stage"]
    return chosen


if __name__ == "__main__":
    cli.run(main)
