"""The command's figures are those worked out by hand from small run folders."""

import json
import subprocess
import sys

import pytest

from jaxlab.core import UserError
from jaxlab.methods.domain_generalization.model_selection import EVALUATOR
from launch import model_selection
from tests.launch import runs

DOMAINS = ("art", "photo", "sketch")


def write_run(folder, held_out, history, status="complete"):
    """`history`: step → (accuracies on the in parts, on the out parts), each [domain][seed] in percent."""
    folder.mkdir(parents=True)
    section = {"name": EVALUATOR, "domains": {domain: {} for domain in DOMAINS}, "test_domains": held_out}
    config = {"seed": 0, "seeds": 3, "evaluators": {"domains": section}}
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for step, parts in history.items():
        line = {"step": step, "split": "eval"}
        for part, of_domains in zip(("in", "out"), parts):
            for domain, accuracies in zip(DOMAINS, of_domains):
                line[f"domains/{domain}/{part}_accuracy"] = [value / 100 for value in accuracies]
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    write_result(folder, status)


def write_result(folder, status="complete"):
    (folder / "result.json").write_text(json.dumps({"status": status, "seeds": [0, 1, 2], "evals": {}}))


def same(value):
    """All domains and seeds have this accuracy."""
    return [[value] * 3] * 3


def write_stages(folder, stages):
    """`stages`: name → held-out domains, history."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seeds": 3, "stages": {name: {} for name in stages}}))
    for name, (held_out, history) in stages.items():
        write_run(folder / name, held_out, history)
    write_result(folder)


@pytest.fixture
def staged(tmp_path):
    """Seed by seed: sketch 40, 50, 60 at step 10 and 70, 70, 70 at step 20; art 80, 90, 70 at both."""
    sketch, art = [40, 50, 60], [80, 90, 70]
    validation = [[90, 90, 90], [90, 90, 90], [0, 0, 0]], [[50, 80, 50], [50, 80, 50], [0, 0, 0]]
    stages = {
        "erm_sketch": (
            ["sketch"],
            {10: ([[0] * 3, [0] * 3, sketch], validation[0]), 20: (same(70), validation[1])},
        ),
        "erm_art": (["art"], {20: ([art, [0] * 3, [0] * 3], same(50))}),
    }
    write_stages(tmp_path / "run", stages)
    return tmp_path / "run"


def test_figures_are_means_and_population_errors_over_trials_and_the_mean_is_taken_within_each(
    staged, capsys
):
    assert model_selection.main([str(staged)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].strip() == "accuracy % on held-out domains"
    assert out.splitlines()[2].split() == ["selected", "by", "art", "sketch", "mean", "trials"]
    # [40, 50, 60] and [80, 90, 70]: s = √(200/3), /√3 = 4.71; the mean [60, 70, 65]: √(50/3)/√3 = 2.36
    art = "80.00 ±4.71"
    first, second, third = (line for line in out.splitlines() if "±" in line)
    assert first.split("training domain")[1].split() == [
        *art.split(),
        "50.00",
        "±4.71",
        "65.00",
        "±2.36",
        "3",
    ]
    # the last step is 70 in every seed
    for line, rule in ((second, "oracle"), (third, "last")):
        assert line.split(rule)[1].split() == [*art.split(), "70.00", "±0.00", "75.00", "±2.36", "3"]


def test_a_sweep_offers_its_runs_and_each_trial_chooses(tmp_path, capsys):
    out_of = {"a": [60, 60, 80], "b": [70, 70, 70]}
    for name, validation in out_of.items():
        test = [0] * 3, [0] * 3, [10, 10, 10] if name == "a" else [30, 30, 30]
        write_run(tmp_path / name, ["sketch"], {5: (test, [validation] * 3)})
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": {"a": {}, "b": {}}}))
    assert model_selection.main([str(tmp_path), "--rule", "training_domain", "--rule", "last"]) == 0
    rows = capsys.readouterr().out
    # b, b, a: 30, 30, 10; the mean is 70/3, from which they are off by 20/3 and 40/3
    mean, error = 70 / 3, (((20 / 3) ** 2 * 2 + (40 / 3) ** 2) / 3 / 3) ** 0.5
    assert f"{mean:.2f} ±{error:.2f}" in rows
    assert "10.00 ±0.00" in rows


def test_pairs_are_for_leaving_one_domain_out_and_stages_for_algorithms(tmp_path, capsys):
    stages = {}
    for algorithm, by in (("erm", 0), ("irm", 20)):
        stages[f"{algorithm}_sketch"] = ["sketch"], {1: (same(40 + by), same(0)), 2: (same(50 + by), same(0))}
        stages[f"{algorithm}_art_sketch"] = ["art", "sketch"], {1: (same(9), same(0)), 2: (same(8), same(0))}
        if algorithm == "irm":
            stages["irm_sketch_photo"] = ["photo", "sketch"], {1: (same(9), same(0)), 2: (same(8), same(0))}
    write_stages(tmp_path / "r", stages)
    assert model_selection.main([str(tmp_path / "r")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "±" in line]
    chosen = [line.split("leave one domain out")[1].split()[0] for line in lines if "leave one" in line]
    assert chosen == ["60.00"]
    assert len(lines) == 3 + 4
    with pytest.raises(UserError, match=r"r · erm: sketch: rule 'leave_one_domain_out': needs"):
        model_selection.main([str(tmp_path / "r"), "--rule", "leave_one_domain_out"])


def test_what_a_rule_cannot_give_is_a_dash_and_what_a_run_has_not_is_blank(tmp_path, capsys):
    history = {1: (same(40), same(0))}
    both = {"sketch": (["sketch"], history), "art": (["art"], history)}
    pairs = {"art_sketch": (["art", "sketch"], history), "photo_sketch": (["photo", "sketch"], history)}
    write_stages(tmp_path / "x", {**both, **pairs})
    write_stages(tmp_path / "y", {"photo": (["photo"], history)})
    assert model_selection.main([str(tmp_path / "x"), str(tmp_path / "y")]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "leave one" in line]
    assert line.split("leave one domain out")[1].split() == ["–", "40.00", "±0.00", "–", "3"]
    y = [line.split("oracle")[1].split() for line in out.splitlines() if "oracle" in line][1]
    assert y == ["40.00", "±0.00", "40.00", "±0.00", "3"]


def test_a_single_trial_has_no_error_and_an_unfinished_run_is_told(tmp_path, capsys):
    write_run(tmp_path / "run", ["art"], {1: (same(40), same(50))}, status="interrupted")
    for name in ("config.json", "metrics.jsonl", "result.json"):
        path = tmp_path / "run" / name
        content = json.loads(path.read_text())
        if name == "metrics.jsonl":
            content = {k: v[:1] if isinstance(v, list) else v for k, v in content.items()}
        content["seeds"] = [0] if name == "result.json" else 1
        path.write_text(json.dumps(content))
    assert model_selection.main([str(tmp_path / "run"), "--rule", "oracle"]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[4].split("oracle")[1].split() == ["40.00", "40.00", "1"]
    assert "interrupted; what it has evaluated so far was taken" in output.err


def test_no_run_and_no_evaluations_are_one_line_with_status_2(tmp_path):
    write_run(tmp_path / "run", ["art"], {})
    for folder, message in (("absent", "not a run folder"), ("run", "no evaluations of held-out domains")):
        done = subprocess.run(
            [sys.executable, "-m", "launch.model_selection", str(tmp_path / folder)],
            cwd=runs.ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
