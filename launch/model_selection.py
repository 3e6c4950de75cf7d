"""Compares domain-generalisation runs by DomainBed's model selection, with the rule beside each figure.

  python -m launch.model_selection runs/pacs
  python -m launch.model_selection runs/erm_sweep runs/irm_sweep --rule training_domain --rule oracle

DIR is the folder of a run, whose stages hold out one domain each, or of a sweep of such runs, whose runs are
then the hyper-parameters to choose from. Stages named ALGORITHM_DOMAIN are grouped by algorithm. A seed is a
trial; checkpoints are the evaluations (config.eval_every). The rules:

  training_domain       validates on held-out examples of the training domains
  leave_one_domain_out  validates on domains that were left out of training besides the test domain; needs
                        stages (or runs) for all pairs of held-out domains
  oracle                validates on held-out examples of the test domain itself, at the last step only
  last                  no selection: the last step of the first run of a sweep

A figure is the accuracy on the in-split of the test domain in percent, mean ± standard error over trials
(population deviation / √trials, as DomainBed has it; none for one trial). The mean is that over test domains
within each trial, then over trials. (Gulrajani and Lopez-Paz, ICLR 2021)
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import rich.box
import rich.table
from rich.console import Console
from rich.text import Text

from jaxlab.core import UserError
from jaxlab.methods.domain_generalization.model_selection import (
    EVALUATOR,
    RULES,
    Records,
    held_out_accuracies,
    mean_and_stderr,
    read_candidates,
    read_records,
)
from jaxlab.report.runs import Run
from launch import cli


class Row(NamedTuple):
    """Accuracies in [0, 1] by one rule, an entry a trial; empty where the rule's records lack.

    `mean` is over the test domains, within each trial that has them all.
    """

    label: str
    rule: str
    by_domain: dict[str, list[float]]
    mean: list[float]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.model_selection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("workdirs", metavar="DIR", nargs="+", help="folder of a run or of a sweep")
    parser.add_argument(
        "--rule",
        action="append",
        choices=RULES,
        help="a selection rule; may be given several times; if left out, all that there are records for",
    )
    arguments = parser.parse_args(argv)
    rows: list[Row] = []
    unfinished: list[Run] = []
    for workdir in dict.fromkeys(arguments.workdirs):
        candidates = read_candidates(workdir)
        unfinished += [run for run in candidates.values() if run.status != "complete"]
        by_algorithm = {name: found for name, found in read_records(candidates).items() if found.test_envs()}
        if not by_algorithm:
            raise UserError(
                f"{workdir}: no evaluations of held-out domains; give a run with the evaluator {EVALUATOR}."
            )
        for algorithm, found in by_algorithm.items():
            label = " · ".join(filter(None, [workdir, algorithm]))
            of_rules = [
                _row(label, found, rule, required=bool(arguments.rule))
                for rule in dict.fromkeys(arguments.rule or RULES)
            ]
            rows += [row for row in of_rules if any(row.by_domain.values())]
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console.width = 120
    console.print(_table(rows))
    for run in unfinished:
        print(f"{run.workdir}: {run.status}; what it has evaluated so far was taken", file=sys.stderr)
    return 0


def _row(label: str, found: Records, rule: str, *, required: bool) -> Row:
    """The figures of one algorithm by one rule; where records lack, an error if `required`, else none."""
    by_domain: dict[str, dict[int, float]] = {}
    for env in found.test_envs():
        try:
            by_domain[found.domains[env]] = held_out_accuracies(found.records, rule, env)
        except UserError as error:
            if required:
                raise UserError(f"{label}: {found.domains[env]}: {error}") from error
            by_domain[found.domains[env]] = {}
    trials = sorted(set.intersection(*(set(by_trial) for by_trial in by_domain.values())))
    means = [float(np.mean([by_trial[trial] for by_trial in by_domain.values()])) for trial in trials]
    return Row(label, rule, {domain: list(values.values()) for domain, values in by_domain.items()}, means)


def _table(rows: Sequence[Row]) -> rich.table.Table:
    """A row for each label and rule, a column for each test domain of any, and their mean."""
    domains = list(dict.fromkeys(domain for row in rows for domain in row.by_domain))
    table = rich.table.Table(
        title=Text("accuracy % on held-out domains", "bold"),
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", overflow="fold")
    table.add_column("selected by", no_wrap=True)
    for heading in (*domains, "mean", "trials"):
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for row in rows:
        cells = [_cell(accuracies) for accuracies in (*map(row.by_domain.get, domains), row.mean)]
        trials = max(len(accuracies) for accuracies in row.by_domain.values())
        table.add_row(Text(row.label), row.rule.replace("_", " "), *cells, str(trials))
    return table


def _cell(accuracies: Sequence[float] | None) -> str:
    """Blank where the domain is not one of the row's, a dash where its figure cannot be had."""
    if not accuracies:
        return "" if accuracies is None else "–"
    mean, stderr = mean_and_stderr(accuracies)
    return f"{100 * mean:.2f}" + (f" ±{100 * stderr:.2f}" if len(accuracies) > 1 else "")


if __name__ == "__main__":
    cli.run(main)
