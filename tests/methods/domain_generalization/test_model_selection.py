"""Splits, draws and choices are DomainBed's, recomputed here from their definitions."""

import hashlib
import json
import math

import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.methods.domain_generalization import model_selection
from jaxlab.methods.domain_generalization.model_selection import (
    default_hparams,
    holdout_split,
    mean_and_stderr,
    random_hparams,
    read_candidates,
    read_records,
    seed_hash,
    select_model,
)

# --- Seeds, splits, hyper-parameters ---


def md5_seed(text):
    return int.from_bytes(hashlib.md5(text.encode()).digest()[-4:], "big") % 2**31


def test_a_seed_is_the_md5_of_the_tuple_as_python_prints_it():
    # md5("(0, 'lr')") = 6e7e663f5bb447258db3823bbca3d164, md5("(0,)") = 5c8a950061aa331153f4a172bbcbfd1b
    assert seed_hash(0, "lr") == 0xBCA3D164 - 2**31
    assert seed_hash(0) == 0xBBCBFD1B - 2**31
    assert seed_hash(1, 2) == md5_seed("(1, 2)")


@pytest.mark.parametrize(("size", "held_out"), [(10, 2), (14, 2), (4, 0), (0, 0)])
def test_a_split_is_the_shuffled_list_cut_at_the_held_out_share(size, held_out):
    in_part, out_part = holdout_split(size, trial_seed=3, environment=1)
    keys = list(range(size))
    np.random.RandomState(md5_seed("(3, 1)")).shuffle(keys)
    assert out_part.tolist() == keys[:held_out]
    assert in_part.tolist() == keys[held_out:]


def test_trials_and_environments_have_splits_of_their_own():
    outs = {tuple(holdout_split(50, trial, env)[1]) for trial in range(3) for env in range(3)}
    assert len(outs) == 9
    assert len(holdout_split(50, 0, 0, holdout_fraction=0.5)[1]) == 25


def test_defaults_are_those_of_the_tables():
    small, large = default_hparams("ERM", True), default_hparams("ERM", False)
    assert small == {"resnet_dropout": 0, "lr": 1e-3, "weight_decay": 0, "batch_size": 64}
    assert large == {"resnet_dropout": 0, "lr": 5e-5, "weight_decay": 0, "batch_size": 32}
    own = {
        "IRM": {"irm_lambda": 100, "irm_penalty_anneal_iters": 500},
        "VREx": {"vrex_lambda": 10, "vrex_penalty_anneal_iters": 500},
        "GroupDRO": {"groupdro_eta": 0.01},
        "Mixup": {"mixup_alpha": 0.2},
        "CORAL": {"mmd_gamma": 1},
        "MMD": {"mmd_gamma": 1},
    }
    for algorithm, expected in own.items():
        assert default_hparams(algorithm, False) == {**large, **expected}
    dann = {"lambda": 1, "weight_decay_d": 0, "d_steps_per_g_step": 1, "grad_penalty": 0, "beta1": 0.5}
    dann |= {"mlp_width": 256, "mlp_depth": 3, "mlp_dropout": 0, "weight_decay_g": 0}
    assert default_hparams("DANN", True) == small | dann | {"lr_g": 1e-3, "lr_d": 1e-3}
    assert default_hparams("CDANN", False) == large | dann | {"lr_g": 5e-5, "lr_d": 5e-5}


def rng(seed, name):
    return np.random.RandomState(md5_seed(f"({seed}, '{name}')"))


@pytest.mark.parametrize("seed", [1, 17, seed_hash(4, 2)])
def test_each_draw_has_a_generator_of_its_own(seed):
    def log(base, name, low, high):
        return base ** rng(seed, name).uniform(low, high)

    def choice(name, *values):
        return values[rng(seed, name).randint(len(values))]  # what RandomState.choice does

    large = {
        "resnet_dropout": choice("resnet_dropout", 0, 0.1, 0.5),
        "lr": log(10, "lr", -5, -3.5),
        "weight_decay": log(10, "weight_decay", -6, -2),
        "batch_size": int(log(2, "batch_size", 3, 5.5)),
    }
    small = large | {
        "lr": log(10, "lr", -4.5, -2.5),
        "weight_decay": 0,
        "batch_size": int(log(2, "batch_size", 3, 9)),
    }
    own = {
        "ERM": {},
        "Mixup": {"mixup_alpha": log(10, "mixup_alpha", -1, 1)},
        "CORAL": {"mmd_gamma": log(10, "mmd_gamma", -1, 1)},
        "MMD": {"mmd_gamma": log(10, "mmd_gamma", -1, 1)},
        "GroupDRO": {"groupdro_eta": log(10, "groupdro_eta", -3, -1)},
    }
    for algorithm, name in (("IRM", "irm"), ("VREx", "vrex")):
        iterations = f"{name}_penalty_anneal_iters"
        own[algorithm] = {
            f"{name}_lambda": log(10, f"{name}_lambda", -1, 5),
            iterations: int(log(10, iterations, 0, 4)),
        }
    for algorithm, expected in own.items():
        assert random_hparams(algorithm, False, seed) == large | expected
        assert random_hparams(algorithm, True, seed) == small | expected
    domainnet = random_hparams("ERM", False, seed, domainnet=True)
    assert domainnet == large | {"batch_size": int(log(2, "batch_size", 3, 5))}
    dann = {
        "lambda": log(10, "lambda", -2, 2),
        "weight_decay_d": log(10, "weight_decay_d", -6, -2),
        "d_steps_per_g_step": int(log(2, "d_steps_per_g_step", 0, 3)),
        "grad_penalty": log(10, "grad_penalty", -2, 1),
        "beta1": choice("beta1", 0, 0.5),
        "mlp_width": int(log(2, "mlp_width", 6, 10)),
        "mlp_depth": choice("mlp_depth", 3, 4, 5),
        "mlp_dropout": choice("mlp_dropout", 0, 0.1, 0.5),
        "lr_g": log(10, "lr_g", -5, -3.5),
        "lr_d": log(10, "lr_d", -5, -3.5),
        "weight_decay_g": log(10, "weight_decay_g", -6, -2),
    }
    assert random_hparams("DANN", False, seed) == random_hparams("CDANN", False, seed) == large | dann
    dann |= {"lr_g": log(10, "lr_g", -4.5, -2.5), "lr_d": log(10, "lr_d", -4.5, -2.5), "weight_decay_g": 0}
    assert random_hparams("DANN", True, seed) == small | dann


def test_draws_are_plain_values_that_json_can_hold():
    drawn = random_hparams("DANN", False, 5)
    assert json.loads(json.dumps(drawn)) == drawn
    assert {name for name, value in drawn.items() if type(value) is int} == {
        "d_steps_per_g_step",
        "mlp_width",
        "mlp_depth",
        "batch_size",
    }


def test_an_unknown_algorithm_is_named_with_the_nearest():
    for function in (default_hparams, lambda *arguments: random_hparams(*arguments, seed=1)):
        with pytest.raises(UserError, match="'GroupDro': unknown. Did you mean 'GroupDRO'"):
            function("GroupDro", True)


# --- Selection ---


def record(hparams_seed, step, test_envs, in_acc, out_acc):
    accuracies = {f"env{i}_in_acc": value for i, value in enumerate(in_acc)}
    accuracies |= {f"env{i}_out_acc": value for i, value in enumerate(out_acc)}
    return {"hparams_seed": hparams_seed, "step": step, "test_envs": test_envs, **accuracies}


# Environment 1 is held out. By its training domains, 0 at step 10 is best; by itself, 1 at its last step.
RECORDS = [
    record(0, 10, [1], (0.9, 0.30, 0.9), (0.8, 0.35, 0.9)),
    record(0, 20, [1], (0.9, 0.31, 0.9), (0.8, 0.50, 0.8)),
    record(1, 10, [1], (0.9, 0.32, 0.9), (0.7, 0.99, 0.9)),
    record(1, 20, [1], (0.9, 0.33, 0.9), (0.6, 0.60, 0.9)),
]
PAIRS = [
    record(0, 10, [0, 1], (0.5, 0, 0), (0, 0, 0)),
    record(0, 10, [1, 2], (0, 0, 0.5), (0, 0, 0)),
    record(0, 20, [1, 0], (0.7, 0, 0), (0, 0, 0)),
    record(0, 20, [2, 1], (0, 0, 0.4), (0, 0, 0)),
    record(1, 10, [0, 1], (0.6, 0, 0), (0, 0, 0)),
    record(1, 10, [1, 2], (0, 0, 0.4), (0, 0, 0)),
    record(1, 20, [0, 1], (1.0, 0, 0), (0, 0, 0)),  # the pair with 2 is missing
]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("training_domain", (0, 10, 0.85, 0.30)),
        ("leave_one_domain_out", (0, 20, 0.55, 0.31)),
        ("oracle", (1, 20, 0.60, 0.33)),
        ("last", (0, 20, math.nan, 0.31)),
    ],
)
def test_each_rule_validates_on_its_own_accuracies_and_reports_the_in_split(rule, expected):
    for records in (RECORDS + PAIRS, (RECORDS + PAIRS)[::-1]):
        selection = select_model(records, rule)
        assert selection == pytest.approx(expected, nan_ok=True)
        assert all(type(value) in (int, float) for value in selection)


@pytest.mark.parametrize("rule", ["training_domain", "leave_one_domain_out", "oracle"])
def test_ties_go_to_the_higher_hparams_seed_and_its_first_checkpoint(rule):
    half = (0.5, 0.5, 0.5)
    records = [
        record(seed, step, envs, half, half)
        for seed in (0, 2, 1)
        for step in (20, 10)
        for envs in ([1], [0, 1], [1, 2])
    ]
    assert select_model(records, rule)[:2] == (2, 20 if rule == "oracle" else 10)


def test_the_only_hyperparameters_have_any_seed():
    assert select_model(RECORDS[2:], "last")[:2] == (1, 20)
    assert select_model(RECORDS[2:], "training_domain")[:2] == (1, 10)
    assert select_model(RECORDS[:1], "oracle") == (0, 10, 0.35, 0.30)


def test_an_accuracy_that_is_nan_is_below_every_other():
    records = [record(5, 10, [0], (0.4, 0.9), (0.5, math.nan)), record(0, 10, [0], (0.3, 0.9), (0.5, 0.0))]
    assert select_model(records, "training_domain") == (0, 10, 0.0, 0.3)
    assert math.isnan(select_model(records[:1], "training_domain").val)


@pytest.mark.parametrize(
    ("records", "rule", "message"),
    [
        (RECORDS, "leave_one_domain_out", "needs, at the same step, a run for each pair"),
        (RECORDS + PAIRS[:1] + PAIRS[3:4], "leave_one_domain_out", "a run for each pair"),
        (PAIRS, "oracle", "none of a run that holds out one domain alone"),
        ([], "oracle", "none of a run that holds out one domain alone"),
        ([*RECORDS, record(0, 10, [2], (0, 0, 0), (0, 0, 0))], "oracle", "none of a run that holds out one"),
        ([record(0, 1, [0], (0.5,), (0.5,))], "training_domain", "have the held-out domain only"),
        ([*RECORDS[2:], record(2, 1, [1], (0, 0), (0, 0))], "last", "which hyper-parameters?"),
        (RECORDS, "orcale", "Did you mean 'oracle'"),
    ],
)
def test_records_that_a_rule_lacks_are_told(records, rule, message):
    with pytest.raises(UserError, match=message):
        select_model(records, rule)


def test_a_standard_error_is_that_of_domainbeds_tables():
    mean, stderr = mean_and_stderr([0.1, 0.2, 0.6])
    assert mean == pytest.approx(0.3)
    assert stderr == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 3) / math.sqrt(3))
    assert mean_and_stderr([0.7]) == (0.7, 0.0)


# --- Records of run folders ---


def write_run(folder, history, test_domains, domains=("b", "a"), seeds=2, **more):
    """`history`: step → for each of four metrics (in and out of each domain) a value a seed."""
    folder.mkdir(parents=True)
    section = {"name": model_selection.EVALUATOR, "domains": {domain: {} for domain in domains}}
    evaluators = {"other": {"name": "classification"}, "by": {**section, "test_domains": test_domains}}
    config = {"seed": 5, "seeds": seeds, "evaluators": evaluators, **more}
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"by/{domain}/{part}_accuracy" for domain in domains for part in ("in", "out")]
    lines = [{"step": 1, "split": "train", "loss": [1.0] * seeds}]
    lines += [{"step": step, "split": "eval", **dict(zip(names, rows))} for step, rows in history.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


HISTORY = {10: [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, None]], 20: [[0, 1]] * 4}


def test_a_record_is_an_evaluation_of_a_seed_and_environments_keep_the_order_of_the_config(tmp_path):
    write_run(tmp_path / "run", HISTORY, ["a"])
    ((algorithm, found),) = read_records(read_candidates(tmp_path / "run")).items()
    assert (algorithm, found.domains, found.test_envs()) == ("", ("b", "a"), [1])
    shared = {"hparams_seed": 0, "test_envs": [1]}
    first = {"env0_in_acc": 0.1, "env0_out_acc": 0.3, "env1_in_acc": 0.5, "env1_out_acc": 0.7}
    assert found.records[0] == {**shared, "trial_seed": 5, "step": 10, **first}
    assert [(r["trial_seed"], r["step"]) for r in found.records] == [(5, 10), (6, 10), (5, 20), (6, 20)]
    assert found.records[1]["env0_in_acc"] == 0.2
    assert math.isnan(found.records[1]["env1_out_acc"])
    assert found.records[3]["env1_in_acc"] == 1.0


def test_stages_are_grouped_by_what_stands_before_their_held_out_domains(tmp_path):
    stages = {
        "pretrain": None,
        "erm_a": ["a"],
        "erm_b": ["b"],
        "erm_b_a": ["a", "b"],
        "irm_a": ["b"],
        "a": ["a"],
        "everything": [],
    }
    write_run(tmp_path / "run", {}, [], stages={name: {} for name in [*stages, "not_begun"]})
    for name, test_domains in stages.items():
        more = {} if test_domains is not None else {"evaluators": {}}
        write_run(tmp_path / "run" / name, HISTORY, test_domains or [], **more)
    found = read_records(read_candidates(tmp_path / "run"))
    held_out = {
        algorithm: [r["test_envs"] for r in group.records if (r["trial_seed"], r["step"]) == (5, 10)]
        for algorithm, group in found.items()
    }
    assert held_out == {"erm": [[1], [0], [1, 0]], "irm_a": [[0]], "": [[1]], "everything": [[]]}


def test_the_runs_of_a_sweep_are_candidates_in_its_order(tmp_path):
    for name, step in (("lr=2", 20), ("lr=1", 10)):
        write_run(tmp_path / name, {step: [[0.5]] * 4}, ["b"], seeds=1)
    runs = {name: {} for name in ("lr=2", "lr=0", "lr=1")}
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs}))
    candidates = read_candidates(tmp_path)
    assert {i: run.workdir.name for i, run in candidates.items()} == {0: "lr=2", 2: "lr=1"}
    found = read_records(candidates)[""]
    assert [(r["hparams_seed"], r["step"]) for r in found.records] == [(0, 20), (2, 10)]


def test_a_run_without_evaluations_or_with_only_some_of_the_domains_has_no_records(tmp_path):
    write_run(tmp_path / "none", {}, ["a"])
    write_run(tmp_path / "some", {10: [[0.5, 0.5]] * 2}, ["a"])
    for name in ("none", "some"):
        assert read_records(read_candidates(tmp_path / name))[""].records == []


@pytest.mark.parametrize("text", ["{", "[]", '{"runs": 3}', "{}"])
def test_a_sweep_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UserError, match=r"sweep\.json: not readable as a sweep"):
        read_candidates(tmp_path)


def test_domains_that_do_not_fit_are_one_line(tmp_path):
    write_run(tmp_path / "run", HISTORY, ["c"])
    with pytest.raises(UserError, match=r"config\.json: evaluators\.by: test domain 'c' is none of: b, a"):
        read_records(read_candidates(tmp_path / "run"))
    write_run(tmp_path / "sweep" / "1", HISTORY, ["a"])
    write_run(tmp_path / "sweep" / "2", HISTORY, ["a"], domains=("a", "b"))
    (tmp_path / "sweep" / "sweep.json").write_text('{"runs": {"1": {}, "2": {}}}')
    with pytest.raises(UserError, match="domains a, b; others that it is compared with have b, a"):
        read_records(read_candidates(tmp_path / "sweep"))
