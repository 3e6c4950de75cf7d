"""One self-contained HTML page of any number of runs, and its tables and pictures as files beside it."""

import base64
import datetime
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2

from jaxlab.report.figures import color, panels
from jaxlab.report.published import beside_published
from jaxlab.report.runs import Run, flatten, read_runs
from jaxlab.report.tables import breakdown, comparison, to_csv, to_markdown, words

_SPLITS = {"train": "training", "eval": "evaluation"}


def write_report(workdirs: Sequence[str | Path], out_dir: str | Path) -> Path:
    """Writes a report of the runs in `workdirs`, finished or not, into `out_dir`.

    Beside the page stand `comparison.md`, `metrics.csv` (every scalar metric, unrounded) and the curves
    over steps as `plots/*.png`.

    Returns:
      The path of its index.html, which loads nothing from outside itself and runs no script.

    Raises:
      UserError: where one of `workdirs` is no run folder.
    """
    out_dir, runs = Path(out_dir).resolve(), read_runs(workdirs)
    (out_dir / "plots").mkdir(parents=True, exist_ok=True)
    parts = [part for run in runs for part in run.parts()]
    evals = {(part.name, part.stage): part.evals for part in parts}
    main, details = comparison(evals), breakdown(evals)

    curves: dict[str, list[dict[str, str]]] = {}
    for stage, split, metric, figure in panels(runs):
        png = BytesIO()
        figure.savefig(png, format="png")
        name = re.sub(r"[^\w.-]", "_", "_".join(filter(None, [stage, split, metric])))
        (out_dir / "plots" / f"{name}.png").write_bytes(png.getvalue())
        title = " · ".join(filter(None, [stage, _SPLITS.get(split, split)]))
        curves.setdefault(title, []).append(_picture(png.getvalue(), metric))

    environments = [_environment(run) for run in runs]
    folders = [str(run.workdir) for run in runs]
    page = _template().render(
        title=runs[0].name if len(runs) == 1 else f"Comparison of {len(runs)} runs",
        date=datetime.date.today().isoformat(),
        runs=runs,
        colors={run.name: color(index) for index, run in enumerate(runs)},
        unfinished={(part.name, part.stage): part.status for part in parts if part.status != "complete"},
        comparison=main,
        breakdown=details,
        published=beside_published(parts),
        curves=curves,
        plots=_run_plots(runs),
        differences=config_differences([run.config for run in runs]),
        environment=_side_by_side(environments),
        commands=[environment.get("command") for environment in environments],
        report_command=shlex.join(["python", "-m", "launch.report", *folders, "--out", str(out_dir)]),
    )
    (out_dir / "index.html").write_text(page, encoding="utf-8")
    (out_dir / "comparison.md").write_text("\n".join(map(to_markdown, main + details)), encoding="utf-8")
    (out_dir / "metrics.csv").write_text(to_csv(runs), encoding="utf-8")
    return out_dir / "index.html"


def config_differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str | None]]:
    """Returns `{flattened key: its value in each config}` for the keys in which any differs from the first.

    Values are JSON text; None stands for a key that a config lacks.
    """
    return {key: values for key, values in _side_by_side(configs).items() if len(set(values)) > 1}


def _side_by_side(trees: Sequence[Mapping[str, Any]]) -> dict[str, list[str | None]]:
    flat = [{key: json.dumps(value, ensure_ascii=False) for key, value in flatten(tree)} for tree in trees]
    keys = dict.fromkeys(key for values in flat for key in values)
    return {key: [values.get(key) for values in flat] for key in keys}


def _environment(run: Run) -> dict[str, Any]:
    """Returns what a run ran on; a run of stages that has not ended tells through its stages."""
    return next((part.environment for part in (run, *run.parts()) if part.environment), {})


def _run_plots(runs: Sequence[Run]) -> dict[str, list[dict[str, str]]]:
    """Returns the runs' own pictures by stage, the same picture of several runs next to each other."""
    found: dict[str, dict[str, list[dict[str, str]]]] = {}
    for run in runs:
        for folder in (run, *run.stages.values()):
            for path in folder.plots:
                picture = _picture(path.read_bytes(), path.stem, run.name if len(runs) > 1 else "")
                found.setdefault(folder.stage, {}).setdefault(path.stem, []).append(picture)
    return {stage: list(chain(*by_name.values())) for stage, by_name in found.items()}


def _picture(png: bytes, name: str, run: str = "") -> dict[str, str]:
    return {"name": name, "run": run, "src": f"data:image/png;base64,{base64.b64encode(png).decode()}"}


def _template() -> jinja2.Template:
    source = resources.files("jaxlab.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        flat=lambda config: dict(flatten(config)),
        json=lambda config: json.dumps(config, indent=2, ensure_ascii=False),
        quote=shlex.quote,
        words=words,
    )
    return environment.from_string(source)
