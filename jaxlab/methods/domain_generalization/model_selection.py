"""How DomainBed chooses what it reports: data splits, hyper-parameters, checkpoints, and error bars.

I. Gulrajani and D. Lopez-Paz, *In Search of Lost Domain Generalization*, ICLR 2021 (arXiv 2007.01434);
https://github.com/facebookresearch/DomainBed. Each environment (domain) e is split in two: methods train on
the "in" part of all environments but the held-out one, τ; the accuracies of both parts of all environments
are recorded at every evaluation. A selection rule turns the records of all hyper-parameters and steps into
one figure, the accuracy on the in part of τ:

  training_domain       the highest mean accuracy on the out parts of the environments other than τ
  leave_one_domain_out  the highest mean over j ≠ τ of the accuracy on the in part of j in runs that hold out
                        both τ and j
  oracle                the highest accuracy on the out part of τ, looking at the last step of each run only:
                        it sees the test domain, and is an upper bound on what selection can give
  last                  no selection (not in DomainBed): the last step of hyper-parameters 0, which are the
                        defaults there and the first run of a sweep here

In DomainBed a trial has a split and random hyper-parameters of its own. Here a trial is a seed of a run, so
that the trials of a sweep share their hyper-parameters; the selection is made within each trial, as there.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlab.core import UserError
from jaxlab.core.errors import nearest
from jaxlab.report.runs import Run, read_run

RULES = ("training_domain", "leave_one_domain_out", "oracle", "last")
EVALUATOR = "domain_generalization.evaluation.domain_accuracy"

Draw = Callable[[np.random.RandomState], float]
Record = Mapping[str, Any]


# --- Seeds, splits, hyper-parameters ---


def seed_hash(*args: Any) -> int:
    """A seed in [0, 2³¹) that follows from anything with a repr: the MD5 of the text of the tuple `args`."""
    return int(hashlib.md5(str(args).encode(), usedforsecurity=False).hexdigest(), 16) % 2**31


def holdout_split(
    size: int, trial_seed: int, environment: int, holdout_fraction: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """Splits the examples of an environment as DomainBed does, index for index.

    Args:
      size: the number of examples, n.
      trial_seed: the trial; each has a split of its own.
      environment: the index of the environment among all, the held-out one included.
      holdout_fraction: the share of the out part, rounded down to whole examples.

    Returns:
      The indices of the in part and of the out part, int64, in shuffled order; together they are 0 … n-1.

    Raises:
      UserError: `holdout_fraction` is no share.
    """
    if not 0 <= holdout_fraction < 1:
        raise UserError(f"holdout_fraction: {holdout_fraction} is no share; give one from 0 to below 1.")
    indices = list(range(size))
    np.random.RandomState(seed_hash(trial_seed, environment)).shuffle(indices)
    held_out = int(size * holdout_fraction)
    return np.array(indices[held_out:], np.int64), np.array(indices[:held_out], np.int64)


def default_hparams(algorithm: str, small_images: bool) -> dict[str, Any]:
    """DomainBed's default hyper-parameters, which are those of hparams seed 0.

    Args:
      algorithm: by DomainBed's name: ERM, IRM, VREx, GroupDRO, Mixup, CORAL, MMD, DANN or CDANN.
      small_images: whether images are 28 × 28 (the MNIST data sets), which have a network of their own.

    Raises:
      UserError: no such algorithm.
    """
    return {name: default for name, (default, _) in _search_space(algorithm, small_images, False).items()}


def random_hparams(
    algorithm: str, small_images: bool, seed: int, *, domainnet: bool = False
) -> dict[str, Any]:
    """Draws hyper-parameters from DomainBed's distributions.

    Each is drawn from a generator of its own, so that another hyper-parameter does not shift the others.

    Args:
      algorithm: see `default_hparams`.
      small_images: see `default_hparams`.
      seed: in DomainBed `seed_hash(hparams_seed, trial_seed)`, with hparams seeds from 1.
      domainnet: draws the batch size from the smaller ones that DomainBed keeps to on DomainNet.

    Raises:
      UserError: no such algorithm.
    """
    return {
        name: draw(np.random.RandomState(seed_hash(seed, name)))
        for name, (_, draw) in _search_space(algorithm, small_images, domainnet).items()
    }


def _power(base: int, low: float, high: float, kind: type = float) -> Draw:
    return lambda rng: kind(base ** rng.uniform(low, high))


def _choice(*values: float) -> Draw:
    return lambda rng: type(values[0])(rng.choice(values))


def _search_space(algorithm: str, small_images: bool, domainnet: bool) -> dict[str, tuple[Any, Draw]]:
    """Name → default and distribution, by the names and in the order of DomainBed's registry."""
    if small_images:
        lr, weight_decay = (1e-3, _power(10, -4.5, -2.5)), (0.0, _choice(0.0))
        batch_size = (64, _power(2, 3, 9, int))
    else:
        lr, weight_decay = (5e-5, _power(10, -5, -3.5)), (0.0, _power(10, -6, -2))
        batch_size = (32, _power(2, 3, 5 if domainnet else 5.5, int))
    anneal = (500, _power(10, 0, 4, int))
    adversarial = {
        "lambda": (1.0, _power(10, -2, 2)),
        "weight_decay_d": (0.0, _power(10, -6, -2)),
        "d_steps_per_g_step": (1, _power(2, 0, 3, int)),
        "grad_penalty": (0.0, _power(10, -2, 1)),
        "beta1": (0.5, _choice(0.0, 0.5)),
        "mlp_width": (256, _power(2, 6, 10, int)),
        "mlp_depth": (3, _choice(3, 4, 5)),
        "mlp_dropout": (0.0, _choice(0.0, 0.1, 0.5)),
    }
    own = {
        "ERM": {},
        "IRM": {"irm_lambda": (100.0, _power(10, -1, 5)), "irm_penalty_anneal_iters": anneal},
        "VREx": {"vrex_lambda": (10.0, _power(10, -1, 5)), "vrex_penalty_anneal_iters": anneal},
        "GroupDRO": {"groupdro_eta": (0.01, _power(10, -3, -1))},
        "Mixup": {"mixup_alpha": (0.2, _power(10, -1, 1))},
        "CORAL": {"mmd_gamma": (1.0, _power(10, -1, 1))},
        "MMD": {"mmd_gamma": (1.0, _power(10, -1, 1))},
        "DANN": adversarial,
        "CDANN": adversarial,
    }
    if algorithm not in own:
        raise UserError(
            f"algorithm '{algorithm}': unknown.{nearest(algorithm, own)} There are: {', '.join(own)}."
        )
    space = {"resnet_dropout": (0.0, _choice(0.0, 0.1, 0.5)), **own[algorithm]}
    space |= {"lr": lr, "weight_decay": weight_decay, "batch_size": batch_size}
    if own[algorithm] is adversarial:
        space |= {"lr_g": lr, "lr_d": lr, "weight_decay_g": weight_decay}
    return space


# --- Selection ---


class Selection(NamedTuple):
    """What a rule chose.

    Attributes:
      hparams_seed: which hyper-parameters.
      step: which checkpoint.
      val: what it was chosen by, an accuracy in [0, 1]; NaN for the rule "last".
      test: the accuracy on the in part of the held-out environment, in [0, 1].
    """

    hparams_seed: int
    step: int
    val: float
    test: float


def select_model(records: Sequence[Record], rule: str) -> Selection:
    """Chooses hyper-parameters and a checkpoint for one trial and one held-out environment τ.

    Of equal ones the higher hparams seed is chosen, and in it the earlier step; NaN is below everything.

    Args:
      records: an evaluation each: `hparams_seed`, `step`, `test_envs` (the indices of the environments that
        were held out: τ, or τ and one more, which only leave_one_domain_out looks at) and, for each
        environment i, the accuracies `env{i}_in_acc` and `env{i}_out_acc` in [0, 1]. τ is the environment
        that is held out in all of them.
      rule: one of `RULES`; what they do is told above.

    Raises:
      UserError: no such rule, or the records that it needs are not there.
    """
    if rule not in RULES:
        raise UserError(f"rule '{rule}': unknown.{nearest(rule, RULES)} There are: {', '.join(RULES)}.")
    shared = set.intersection(*(set(record["test_envs"]) for record in records)) if records else set()
    alone = [record for record in records if len(record["test_envs"]) == 1]
    if len(shared) != 1 or not alone:
        raise UserError("records: none of a run that holds out one domain alone; train that run first.")
    (test_env,) = shared
    runs: dict[int, list[Record]] = {}
    for record in sorted(alone, key=lambda record: record["step"]):
        runs.setdefault(record["hparams_seed"], []).append(record)
    if rule == "last":
        if len(runs) > 1 and 0 not in runs:
            raise UserError("rule 'last': which hyper-parameters? There are several, and none has seed 0.")
        (run,) = [runs[0]] if 0 in runs else runs.values()
        validated = [(run[-1], math.nan)]
    elif rule == "oracle":
        validated = [(run[-1], run[-1][f"env{test_env}_out_acc"]) for run in runs.values()]
    elif rule == "training_domain":
        validated = _by_training_domains(alone, test_env)
    else:
        validated = _by_leaving_one_domain_out(records, test_env)
    record, val = max(validated, key=_preference)
    return Selection(
        record["hparams_seed"], record["step"], float(val), float(record[f"env{test_env}_in_acc"])
    )


def _preference(validated: tuple[Record, float]) -> tuple[float, int, int]:
    record, val = validated
    return -math.inf if math.isnan(val) else val, record["hparams_seed"], -record["step"]


def _others(record: Record, test_env: int) -> list[int]:
    """The environments of a record other than `test_env`."""
    known = itertools.takewhile(lambda i: f"env{i}_out_acc" in record, itertools.count())
    others = [i for i in known if i != test_env]
    if not others:
        raise UserError("records: they have the held-out domain only; a rule needs another to validate on.")
    return others


def _by_training_domains(alone: Sequence[Record], test_env: int) -> list[tuple[Record, float]]:
    return [
        (record, np.mean([record[f"env{i}_out_acc"] for i in _others(record, test_env)])) for record in alone
    ]


def _by_leaving_one_domain_out(records: Sequence[Record], test_env: int) -> list[tuple[Record, float]]:
    """The records of τ alone for which there is a pair with every other environment, validated by those."""
    pairs: dict[tuple[int, int], dict[int, float]] = {}
    for record in records:
        if len(record["test_envs"]) == 2:
            (other,) = set(record["test_envs"]) - {test_env}
            at = record["hparams_seed"], record["step"]
            pairs.setdefault(at, {})[other] = record[f"env{other}_in_acc"]
    validated = []
    for record in records:
        if len(record["test_envs"]) == 1:
            paired = pairs.get((record["hparams_seed"], record["step"]), {})
            others = _others(record, test_env)
            if paired.keys() >= set(others):
                validated.append((record, np.mean([paired[i] for i in others])))
    if not validated:
        raise UserError(
            "rule 'leave_one_domain_out': needs, at the same step, a run for each pair of held-out domains;"
            " train those too, or choose another rule."
        )
    return validated


def held_out_accuracies(records: Sequence[Record], rule: str, test_env: int) -> dict[int, float]:
    """Trial seed → the accuracy on the held-out environment `test_env` that `rule` gives in that trial.

    Args:
      records: as for `select_model`, with `trial_seed` too; those that do not hold out `test_env` are passed
        over.
      rule: one of `RULES`.
      test_env: the index of the held-out environment.

    Raises:
      UserError: as for `select_model`.
    """
    trials: dict[int, list[Record]] = {}
    for record in records:
        if test_env in record["test_envs"]:
            trials.setdefault(record["trial_seed"], []).append(record)
    return {trial: select_model(trials[trial], rule).test for trial in sorted(trials)}


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error over T trials as in DomainBed's tables.

    The deviation is that of the population, so that the error is √((T-1)/T) of the one that all other tables
    of jaxlab show (`jaxlab.core.statistics`), and 0 for one trial.
    """
    return float(np.mean(values)), float(np.std(values) / math.sqrt(len(values)))


# --- Records of run folders ---


class Records(NamedTuple):
    """The evaluations of one algorithm.

    Attributes:
      domains: the names of all environments, by index.
      records: as `held_out_accuracies` takes them.
    """

    domains: tuple[str, ...]
    records: list[dict[str, Any]]

    def test_envs(self) -> list[int]:
        """The environments that were held out alone."""
        return sorted({env for r in self.records if len(r["test_envs"]) == 1 for env in r["test_envs"]})


def read_candidates(workdir: str | Path) -> dict[int, Run]:
    """Reads hparams seed → run: the runs of a sweep in the order of its sweep.json, or 0 → a run.

    Runs of a sweep that have not begun are passed over; the others keep their number.

    Raises:
      UserError: `workdir` is neither, or a file cannot be read.
    """
    path = Path(workdir) / "sweep.json"
    if not path.is_file():
        return {0: read_run(workdir)}
    try:
        names = list(json.loads(path.read_text(encoding="utf-8"))["runs"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not readable as a sweep ({error!r}); run launch.sweep there again."
        ) from error
    begun = [(i, path.parent / name) for i, name in enumerate(names)]
    return {i: read_run(folder) for i, folder in begun if (folder / "config.json").is_file()}


def read_records(candidates: Mapping[int, Run]) -> dict[str, Records]:
    """Turns runs into records, by algorithm.

    A record is an evaluation of one seed of a run, or of a stage of it, whose config has an evaluator of the
    name `EVALUATOR`: its `domains` say which environments there are and its `test_domains` which of them are
    held out. Stages without one are passed over. The algorithm is the name of a stage without the held-out
    domains at its end: "irm" for `irm_sketch`, or for `irm_sketch_photo`, where a pair is held out; "" for a
    run without stages.

    Args:
      candidates: hparams seed → run.

    Raises:
      UserError: a config's held-out domain is none of its domains, or the domains of one algorithm differ.
    """
    found: dict[str, Records] = {}
    for hparams_seed, part in ((i, part) for i, run in candidates.items() for part in run.parts()):
        for name, section in (part.config.get("evaluators") or {}).items():
            if not isinstance(section, Mapping) or section.get("name") != EVALUATOR:
                continue
            domains, held_out = tuple(section.get("domains") or ()), section.get("test_domains") or ()
            where = f"{part.workdir / 'config.json'}: evaluators.{name}"
            for domain in held_out:
                if domain not in domains:
                    raise UserError(f"{where}: test domain '{domain}' is none of: {', '.join(domains)}.")
            test_envs = [domains.index(domain) for domain in dict.fromkeys(held_out)]
            records = found.setdefault(_algorithm(part.stage, held_out), Records(domains, []))
            if records.domains != domains:
                raise UserError(
                    f"{where}: domains {', '.join(domains)}; others that it is compared with have"
                    f" {', '.join(records.domains)}. Runs of one algorithm need the same, in the same order."
                )
            records.records.extend(
                {"hparams_seed": hparams_seed, "test_envs": test_envs, **record}
                for record in _evaluations(part, name, domains)
            )
    return found


def _algorithm(stage: str, held_out: Sequence[str]) -> str:
    for suffix in ("_".join(order) for order in itertools.permutations(held_out)):
        if stage == suffix:
            return ""
        if suffix and stage.endswith(f"_{suffix}"):
            return stage.removesuffix(f"_{suffix}")
    return stage


def _evaluations(run: Run, evaluator: str, domains: Sequence[str]) -> list[dict[str, Any]]:
    """The accuracies of each step at which all were evaluated, a record for each seed."""
    curves = {
        f"env{i}_{part}_acc": run.history.get(("eval", f"{evaluator}/{domain}/{part}_accuracy"))
        for i, domain in enumerate(domains)
        for part in ("in", "out")
    }
    if not curves or any(curve is None for curve in curves.values()):
        return []
    values = {key: dict(zip(curve.steps.tolist(), curve.values)) for key, curve in curves.items()}
    steps = set.intersection(*(set(by_step) for by_step in values.values()))
    return [
        {"trial_seed": seed, "step": step} | {key: float(values[key][step][i]) for key in values}
        for step in sorted(steps)
        for i, seed in enumerate(run.seeds)
    ]
