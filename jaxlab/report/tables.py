"""Comparison tables: mean ± standard error over seeds, the best of each column marked.

The layout comes from the metrics' names, `<evaluator>/<group>/.../<leaf>`: the leaf is the column, the
first group the row. Where there are further groups, the one named "mean" stands in the comparison and
the others in a breakdown of their own, one table a leaf.
"""

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import rich.box
import rich.table
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from jaxlab.core.statistics import mean_and_stderr
from jaxlab.report.runs import Evals, Run, evals_by_stage

_LOWER = "fpr|fnr|loss|nll|ece|error|mse|rmse|mae|brier|cross_entropy|perplexity|gap|difference|disparity|fid"
_HIGHER = "accuracy|auroc|auc|aupr|auprc|tpr|tnr|f1|precision|recall|iou|miou|dice|r2|psnr|ssim|concordance"
_FRACTION = "accuracy|auroc|auc|aupr|auprc|fpr|fnr|tpr|tnr|f1|precision|recall|iou|miou|dice|ece"
_MOST_COLUMNS = 8  # that fit a page side by side

Part = tuple[str, str]  # the names of a run and of its stage; "" where there is none


class Column(NamedTuple):
    """A column: what spans it and its neighbours, its own name, and the leaf that says how to read it."""

    heading: str
    name: str
    leaf: str

    def label(self) -> str:
        """Returns the name with its unit and an arrow towards the better values, such as "fpr95 % ↓"."""
        arrow = {"lower": "↓", "higher": "↑", None: ""}[direction(self.leaf)]
        return " ".join(filter(None, [words(self.name), "%" if is_fraction(self.leaf) else "", arrow]))


class Cell(NamedTuple):
    """A figure as shown: `error` is empty for one seed, `note` where every seed gave a value.

    `best` marks the best mean of its column, `close` one whose standard error reaches the best's.
    """

    mean: str
    error: str
    note: str
    best: bool = False
    close: bool = False


class Row(NamedTuple):
    """The cells of one run, stage and group; the group is "" for what the whole stage has."""

    run: str
    stage: str
    group: str
    cells: tuple[Cell | None, ...]


class Table(NamedTuple):
    """Rows in the order of runs and stages; where any has groups, each stage opens with a row without.

    The title is empty, or names the one leaf of all columns.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def nested(self) -> bool:
        """Returns whether stages have groups below them."""
        return any(row.group for row in self.rows)

    def labels(self) -> list[str]:
        """Returns the columns' names, with unit and arrow where the title does not give them."""
        return [words(column.name) if self.title else column.label() for column in self.columns]

    def headings(self) -> list[tuple[str, int]]:
        """Returns what spans the columns, and how many."""
        return [(heading, len(list(same))) for heading, same in groupby(c.heading for c in self.columns)]


def direction(leaf: str) -> Literal["lower", "higher"] | None:
    """Returns which values of a metric are better, None where its name does not tell."""
    if _has_word(leaf, _LOWER):  # first: an accuracy_gap is a gap
        return "lower"
    return "higher" if _has_word(leaf, _HIGHER) else None


def is_fraction(leaf: str) -> bool:
    """Returns whether a metric lies in [0, 1] and is shown in percent."""
    return _has_word(leaf, _FRACTION)


def words(name: str) -> str:
    """Returns a name as prose: "maximum softmax probability"."""
    return name.replace("_", " ")


def comparison(evals: Mapping[Part, Evals]) -> list[Table]:
    """Returns the main table of `{(run, stage): evals}`, or one an evaluator where it would be too wide."""
    names = _names(evals)
    evaluators = list(dict.fromkeys(name.split("/")[0] for name in names))
    leaves = {e: {name.split("/")[-1] for name in names if name.split("/")[0] == e} for e in evaluators}
    places = {}
    for name in names:
        evaluator, *groups, leaf = name.split("/") if "/" in name else ("", name)
        prefix = evaluator if len(evaluators) > 1 else ""
        if not groups:
            places[name] = "", Column(prefix, leaf, leaf)
        elif len(groups) == 1 and len(leaves[evaluator]) == 1:  # a column a group reads better than a row
            places[name] = "", Column(_join(prefix, leaf), groups[0], leaf)
        elif len(groups) == 1:
            places[name] = groups[0], Column(prefix, leaf, leaf)
        elif groups[1:] == ["mean"]:
            places[name] = groups[0], Column(_join(prefix, "mean"), leaf, leaf)
    if len({column for _, column in places.values()}) <= _MOST_COLUMNS:
        return [_table("", places, evals)]
    by_evaluator: dict[str, dict[str, tuple[str, Column]]] = {}
    for name, place in places.items():
        by_evaluator.setdefault(name.split("/")[0], {})[name] = place
    return [_table("", own, evals) for own in by_evaluator.values()]


def breakdown(evals: Mapping[Part, Evals]) -> list[Table]:
    """Returns one table a leaf for metrics with more than one group; their mean is the last column."""
    tables: dict[str, dict[str, tuple[str, Column]]] = {}
    paths = [name.split("/") for name in _names(evals) if name.count("/") > 2]
    several = len({path[0] for path in paths}) > 1
    for path in sorted(paths, key=lambda path: path[-2] == "mean"):
        evaluator, group, *rest, leaf = path
        column = Column("", " · ".join(rest), leaf)
        title = _join(evaluator if several else "", column._replace(name=leaf).label())
        tables.setdefault(title, {})["/".join(path)] = group, column
    return [_table(title, places, evals) for title, places in tables.items()]


def print_table(result: Mapping[str, Any], title: str, *, console: Console | None = None) -> None:
    """Prints the comparison of the stages and groups of one result.json.

    The breakdown of its means follows, without standard errors.
    """
    if console is None:
        console = Console()
        if not console.is_terminal:  # a file or a pipe has no width of its own
            console.width = 120
    evals = _of_result(result)
    for i, table in enumerate(comparison(evals)):
        console.print(_to_rich(table, "" if i else title))
    for table in breakdown(evals):
        console.print(_to_rich(table, table.title, errors=False))


def to_markdown(table: Table) -> str:
    """Returns the table in GitHub's Markdown, the best figures in bold."""
    heads = [_join(column.heading, label) for column, label in zip(table.columns, table.labels())]
    lines = [["", *heads], ["---", *["---:"] * len(heads)]]
    for row in table.rows:
        bold = [("**" if cell.best else "") if cell else "" for cell in row.cells]
        cells = [f"{b}{cell.mean}{b}{cell.error}" if cell else "" for b, cell in zip(bold, row.cells)]
        lines.append([_join(row.run, row.stage, words(row.group)), *cells])
    rows = ("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in lines)
    return (f"### {table.title}\n\n" if table.title else "") + "".join(rows)


def to_csv(runs: Iterable[Run]) -> str:
    """Returns every scalar metric of every run and stage, unrounded: one line a metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "stage", "metric", "mean", "stderr", "seeds"])
    for part in (part for run in runs for part in run.parts()):
        for name, values in part.evals.items():
            mean, stderr = mean_and_stderr(values)
            writer.writerow([part.name, part.stage, name, mean, stderr, len(values)])
    return text.getvalue()


def _table(title: str, places: Mapping[str, tuple[str, Column]], evals: Mapping[Part, Evals]) -> Table:
    """Lays metrics out by their `(group, column)` places."""
    # What the whole stage has comes first: its row stands above those of the groups.
    in_order = sorted(places.values(), key=lambda place: place[0] != "")
    columns = list(dict.fromkeys(column for _, column in in_order))
    groups = list(dict.fromkeys(["", *(group for group, _ in in_order)]))
    names = {place: name for name, place in places.items()}
    rows, values = [], []
    for (run, stage), metrics in evals.items():
        if not metrics.keys() & places.keys():
            continue
        for group in groups:
            found = [metrics.get(names.get((group, column), ""), ()) for column in columns]
            if any(found) or (group == "" and len(groups) > 1):
                rows.append((run, stage, group))
                values.append(found)
    cells = [_cells(column.leaf, [line[i] for line in values]) for i, column in enumerate(columns)]
    return Table(title, tuple(columns), tuple(Row(*row, line) for row, line in zip(rows, zip(*cells))))


def _cells(leaf: str, column: Sequence[Sequence[float]]) -> list[Cell | None]:
    """Formats a column and marks its best; an entry has one value a seed, or none where there is no cell."""
    estimates = [tuple(map(float, mean_and_stderr(values))) for values in column]
    ranked = sorted((e for e in estimates if not math.isnan(e[0])), reverse=direction(leaf) == "higher")
    best, best_error = ranked[0] if direction(leaf) and len(ranked) > 1 else (math.nan, math.nan)
    reach = 0.0 if math.isnan(best_error) else best_error
    cells: list[Cell | None] = []
    for values, (mean, error) in zip(column, estimates):
        text, error_text = _format(leaf, mean, error)
        present = sum(not math.isnan(value) for value in values)
        note = f"{present}/{len(values)} seeds" if present < len(values) else ""
        is_best = not math.isnan(best) and text == _format(leaf, best, best_error)[0]
        is_close = not is_best and abs(mean - best) <= reach + (0.0 if math.isnan(error) else error)
        cells.append(Cell(text, error_text, note, is_best, is_close) if values else None)
    return cells


def _format(leaf: str, mean: float, error: float) -> tuple[str, str]:
    """Returns mean and standard error as shown: in percent, or the mean to four significant digits."""
    if math.isnan(mean):
        return "–", ""
    if is_fraction(leaf):
        mean, error, spec = 100 * mean, 100 * error, ".2f"
    elif mean == 0 or not math.isfinite(mean):
        spec = ".3f"
    elif 1e-3 <= abs(mean) < 1e6:
        spec = f".{max(0, 3 - math.floor(math.log10(abs(mean))))}f"
    else:
        spec = ".3e"
    return f"{mean:{spec}}".replace("-", "−"), "" if math.isnan(error) else f" ±{error:{spec}}"


def _to_rich(table: Table, title: str, *, errors: bool = True) -> rich.table.Table:
    out = rich.table.Table(
        title=Text(title, "bold"), title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    texts = [[_cell_text(cell, errors) for cell in row.cells] for row in table.rows]
    out.add_column("", vertical="bottom")
    for i, (column, label) in enumerate(zip(table.columns, table.labels())):
        head = "\n".join(filter(None, [*column.heading.split(" · "), label]))
        # Where the terminal is narrow, the labels give way and not the figures.
        width = max(len(line[i]) for line in texts)
        out.add_column(Text(head), justify="right", vertical="bottom", min_width=width)
    for row, line in zip(table.rows, texts):
        style = "bold" if table.nested() and not row.group else ""
        label = Text(words(row.group) or _join(row.run, row.stage), style)
        out.add_row(Padding(label, (0, 0, 0, 2 if row.group else 0)), *line)
    return out


def _cell_text(cell: Cell | None, errors: bool) -> Text:
    if cell is None:
        return Text()
    return Text.assemble((cell.mean, "bold" if cell.best else ""), (cell.error if errors else "", "dim"))


def _of_result(result: Mapping[str, Any]) -> dict[Part, Evals]:
    return {("", stage): evals for stage, evals in evals_by_stage(result).items()}


def _names(evals: Mapping[Part, Evals]) -> list[str]:
    return list(dict.fromkeys(name for metrics in evals.values() for name in metrics))


def _has_word(leaf: str, words: str) -> bool:
    return re.search(rf"(?:^|_)(?:{words})\d*(?:_|$)", leaf) is not None


def _join(*texts: str) -> str:
    return " · ".join(filter(None, texts))
