"""Published figures beside those of runs that follow the same protocol.

A file of `third_party/published` has {"about", "protocol", "rows"}: the protocol is what the sections
`evaluator` and `network` of a config must hold, and the OOD sets `ood`; a row names the data set, the stage,
the score and the OOD set that its figures, in percent, are of, and its source.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlab.core.statistics import mean_and_stderr
from jaxlab.report.runs import Run

FOLDER = Path(__file__).parents[2] / "third_party" / "published"
METRICS = ("fpr95", "auroc", "aupr")


class Comparison(NamedTuple):
    """One published row beside a run's own figures: pairs of text in percent, in the order of `METRICS`."""

    run: str
    stage: str
    score: str
    ood: str
    figures: tuple[tuple[str, str], ...]
    source: str


def beside_published(parts: Sequence[Run], folder: Path = FOLDER) -> list[Comparison]:
    """Returns what is published of the runs' own data sets, stages, scores and protocols."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [found for part in parts for file in files for found in _of_part(part, file)]


def _of_part(part: Run, file: Mapping[str, Any]) -> Iterator[Comparison]:
    protocol = file["protocol"]
    if not _holds(part.config.get("network") or {}, protocol["network"]):
        return
    for name, section in part.config.get("evaluators", {}).items():
        same_sets = set(section.get("ood", ())) == set(protocol["ood"])
        if not same_sets or not _holds(section, protocol["evaluator"]):
            continue
        dataset = section.get("dataset", {})
        for row in file["rows"]:
            prefix = f"{name}/{row['score']}/{row['ood']}"
            values = [part.evals.get(f"{prefix}/{metric}") for metric in METRICS]
            same = (row["dataset"], row["stage"]) == (dataset.get("dataset"), part.stage)
            if same and dataset.get("split") == "test" and all(values):
                yield Comparison(
                    part.name,
                    part.stage,
                    row["score"],
                    row["ood"],
                    tuple((_percent(v), f"{row[metric]:.2f}") for v, metric in zip(values, METRICS)),
                    "; ".join(filter(None, [row["source"], row.get("note")])),
                )


def _holds(section: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(key in section and section[key] == value for key, value in wanted.items())


def _percent(values: Sequence[float]) -> str:
    mean, stderr = mean_and_stderr(values)
    return f"{100 * mean:.2f}" + (f" ± {100 * stderr:.2f}" if len(values) > 1 else "")
