import io
import math

import pytest
from rich.console import Console

from jaxlab.report.runs import read_run
from jaxlab.report.tables import (
    breakdown,
    comparison,
    direction,
    is_fraction,
    print_table,
    to_csv,
    to_markdown,
)


def _detection(offset):
    return {
        f"detection/{score}/{group}/{leaf}": [base + offset, base + offset + 0.02]
        for score, base in (("energy", 0.2), ("knn", 0.4))
        for group in ("uniform", "mean", "jigsaw")
        for leaf in ("fpr95", "auroc")
    }


def _column(table, name):
    i = [column.name for column in table.columns].index(name)
    return {(row.run, row.stage, row.group): row.cells[i] for row in table.rows}


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        ("fpr95", "lower"),
        ("train_loss", "lower"),
        ("nll", "lower"),
        ("ece", "lower"),
        ("accuracy_gap", "lower"),
        ("accuracy", "higher"),
        ("worst_group_accuracy", "higher"),
        ("top5_accuracy", "higher"),
        ("aupr", "higher"),
        ("temperature", None),
        ("glossary", None),
    ],
)
def test_direction_is_read_from_whole_words_of_the_name(leaf, expected):
    assert direction(leaf) == expected


def test_fractions_are_shown_in_percent_and_the_rest_with_four_digits():
    metrics = {
        "test/accuracy": [0.5, 0.6],
        "test/nll": [0.0123456],
        "test/tries": [123456.0],
        "test/lr": [-2e-5],
    }
    (row,) = comparison({("a", ""): metrics})[0].rows
    assert [cell.mean + cell.error for cell in row.cells] == [
        "55.00 ±5.00",
        "0.01235",
        "123456",
        "−2.000e−05",
    ]
    assert is_fraction("fpr95")
    assert not is_fraction("loss")


@pytest.mark.parametrize(("leaf", "best"), [("loss", "a"), ("accuracy", "b"), ("temperature", None)])
def test_the_best_is_marked_in_the_direction_of_the_metric(leaf, best):
    (table,) = comparison({("a", ""): {f"test/{leaf}": [0.1, 0.2]}, ("b", ""): {f"test/{leaf}": [0.8, 0.9]}})
    assert {run for (run, _, _), cell in _column(table, leaf).items() if cell.best} == ({best} - {None})
    assert not any(cell.close for cell in _column(table, leaf).values())


def test_ties_share_the_mark_overlaps_are_noted_and_nan_never_wins():
    values = {"a": [0.5], "b": [0.5], "c": [0.3, 0.6], "d": [0.1, 0.1], "e": [math.nan, math.nan]}
    (table,) = comparison({(run, ""): {"test/accuracy": entry} for run, entry in values.items()})
    cells = {run: cell for (run, _, _), cell in _column(table, "accuracy").items()}
    assert [run for run, cell in cells.items() if cell.best] == ["a", "b"]
    assert [run for run, cell in cells.items() if cell.close] == ["c"]
    assert (cells["e"].mean, cells["e"].note) == ("–", "0/2 seeds")


def test_a_single_figure_is_not_called_the_best():
    (row,) = comparison({("a", ""): {"test/accuracy": [0.5]}})[0].rows
    assert not row.cells[0].best


def test_rows_are_groups_and_columns_are_leaves_with_the_mean_over_inner_groups():
    evals = {
        ("a", "pretrain"): _detection(0.0) | {"detection/accuracy": [0.9, 0.9]},
        ("a", "finetune"): _detection(0.1),
    }
    (table,) = comparison(evals)
    assert [(column.heading, column.label()) for column in table.columns] == [
        ("", "accuracy % ↑"),
        ("mean", "fpr95 % ↓"),
        ("mean", "auroc % ↑"),
    ]
    assert [(row.stage, row.group) for row in table.rows] == [
        ("pretrain", ""),
        ("pretrain", "energy"),
        ("pretrain", "knn"),
        ("finetune", ""),
        ("finetune", "energy"),
        ("finetune", "knn"),
    ]
    assert _column(table, "fpr95")["a", "pretrain", "energy"].best
    assert _column(table, "auroc")["a", "finetune", "knn"].best
    assert _column(table, "auroc")["a", "finetune", ""] is None


def test_inner_groups_have_a_table_a_leaf_with_the_mean_last():
    tables = breakdown({("a", ""): _detection(0.0)})
    assert [table.title for table in tables] == ["fpr95 % ↓", "auroc % ↑"]
    assert tables[0].labels() == ["uniform", "jigsaw", "mean"]


def test_groups_of_a_single_leaf_become_columns():
    (table,) = comparison({("a", ""): {"groups/worst/accuracy": [0.4], "groups/best/accuracy": [0.9]}})
    assert [(column.heading, column.label()) for column in table.columns] == [
        ("accuracy", "worst % ↑"),
        ("accuracy", "best % ↑"),
    ]
    assert [row.group for row in table.rows] == [""]


def test_a_table_too_wide_to_read_is_one_for_each_evaluator():
    def metrics(evaluator, count):
        return {f"{evaluator}/metric{i}": [0.5] for i in range(count)}

    assert len(comparison({("a", ""): metrics("x", 4) | metrics("y", 4)})) == 1
    wide = {("a", ""): metrics("x", 4), ("b", ""): metrics("y", 5) | metrics("x", 4)}
    first, second = comparison(wide)
    assert (first.headings(), [row.run for row in first.rows]) == ([("x", 4)], ["a", "b"])
    assert (second.headings(), [row.run for row in second.rows]) == ([("y", 5)], ["b"])


def test_nothing_evaluated_is_an_empty_table():
    (table,) = comparison({("a", ""): {}})
    assert table.rows == ()
    assert breakdown({("a", ""): {}}) == []


def _result(evals, stages):
    evals = {f"{stage}/{name}": {"values": values} for stage in stages for name, values in evals.items()}
    return {"config": {"stages": {stage: {} for stage in stages}}, "evals": evals}


def test_the_terminal_table_fits_a_hundred_columns_and_shows_names_as_they_are():
    evals = _detection(0.0) | {"detection/accuracy": [0.9, 0.91], "detection/roc/energy": [[0.0], [1.0]]}
    console = Console(width=100, record=True, file=io.StringIO())
    print_table(_result(evals, ["pretrain", "finetune"]), "[red]runs[/red]", console=console)
    text = console.export_text()
    assert "[red]runs[/red]" in text
    assert "21.00 ±1.00" in text
    assert "roc/" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_markdown_has_the_best_in_bold():
    (table,) = comparison({("a|b", ""): {"test/accuracy": [0.5]}, ("c", ""): {"test/accuracy": [0.75]}})
    assert to_markdown(table).splitlines()[2:] == ["| a\\|b | 50.00 |", "| c | **75.00** |"]


def test_csv_is_unrounded(write_run):
    run = read_run(write_run("a", {"test/accuracy": [0.25, 0.5]}))
    assert to_csv([run]).splitlines()[1] == "a,,test/accuracy,0.375,0.125,2"
