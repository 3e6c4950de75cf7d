import re
import runpy

import pytest

from jaxlab.report.page import config_differences, write_report
from launch import report

HISTORY = [{"step": step, "split": "train", "loss": [1.0 / step, 2.0 / step]} for step in (1, 2, 3)]
SCRIPT = "<script>alert(1)<"


@pytest.fixture
def page(write_run, tmp_path):
    evals = {
        "d/accuracy": [0.5, 0.6],
        "d/energy/mean/auroc": [0.7, 0.8],
        "d/energy/uniform/auroc": [0.7, 0.9],
    }
    first = write_run("first", evals, history=HISTORY, method={"name": "erm", "decay": 0.1})
    second = write_run(SCRIPT, evals, history=HISTORY, method={"name": "<i>", "decay": 0.1})
    third = write_run("third", history=HISTORY, method={"name": "erm"})
    (first / "plots").mkdir()
    (first / "plots" / "roc_energy.png").write_bytes(b"\x89PNG picture")
    return write_report([first, second, third], tmp_path / "report").read_text()


def test_the_page_loads_nothing_and_runs_nothing(page):
    assert not re.search(r"https?://|<link|@import|url\(", page)
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 2  # the loss of all runs, and the first's own picture
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "default-src 'none'" in page


def test_what_the_page_shows_is_escaped(page):
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;" in page
    assert "<i>" not in page
    assert "&lt;i&gt;" in page


def test_the_page_shows_figures_differences_and_commands(page):
    assert '<span>55.00</span></td><td class="error"> ±5.00' in page
    differences = page[page.index("Configuration") : page.index("Reproduce")]
    assert re.findall(r"<tr><th>(.*?)</th>", differences)[1:] == ["seeds", "method.name", "method.decay"]
    assert "python -m launch.train --workdir first" in page
    assert "unfinished" in page


def test_files_stand_beside_the_page(page, tmp_path):
    files = {str(path.relative_to(tmp_path / "report")) for path in (tmp_path / "report").rglob("*.*")}
    assert files == {"index.html", "comparison.md", "metrics.csv", "plots/train_loss.png"}
    assert "| first | **55.00** ±5.00 |" in (tmp_path / "report" / "comparison.md").read_text()


def test_the_best_cell_and_no_other_is_bold(write_run, tmp_path):
    runs = [write_run(name, {"d/loss": [value]}) for name, value in (("a", 3.0), ("b", 1.0), ("c", 2.0))]
    text = write_report(runs, tmp_path / "report").read_text()
    assert re.findall(r'class="mean best"><span>(.*?)</span>', text) == ["1.000"]


def test_a_staged_run_that_has_not_begun_makes_a_page(write_run, tmp_path):
    workdir = write_run("a", stages={"pretrain": {"steps": 5}})
    assert "Nothing has been evaluated yet." in write_report([workdir], workdir / "report").read_text()


def test_config_differences_are_the_keys_in_which_any_run_differs():
    configs = [
        {"a": {"x": 1, "y": "s"}, "b": 0},
        {"a": {"x": 1, "y": "t"}, "b": 0},
        {"a": {"x": 1}, "b": 0, "c": None},
    ]
    assert config_differences(configs) == {"a.y": ['"s"', '"t"', None], "c": [None, None, "null"]}


def test_the_command_prints_where_the_page_is(write_run, tmp_path, capsys):
    assert report.main([str(write_run("a", {"d/loss": [1.0]})), "--out", str(tmp_path / "report")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report" / "index.html")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_folder_that_is_no_run_ends_in_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path), "--out", str(tmp_path / "report")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("launch.report", run_name="__main__")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}: not a run folder")
    assert error.count("\n") == 1
    assert not (tmp_path / "report").exists()
