"""How well a score separates two sets of examples. On the host, in float64, so that no score is rounded.

Scores are compared as they are: squashing them into [0, 1] would turn large ones into ties. Infinite
scores are legal and rank as such; a NaN has no rank and is an error.

The definitions are those of the official code of Liu et al., *Energy-based Out-of-distribution
Detection*, NeurIPS 2020 (arXiv 2010.03759). Definitions of FPR95 in other codebases differ in which
class is positive and in which threshold is taken, and so do their numbers; see `ood_metrics`.
"""

from typing import Literal

import chex
import jax
import numpy as np
from numpy.typing import ArrayLike

from jaxlab.core import UserError

Rule = Literal["nearest", "at_least"]
Positive = Literal["id", "ood"]


def auroc(pos: ArrayLike, neg: ArrayLike) -> float:
    """Area under the ROC curve: P(pos > neg) + P(pos = neg) / 2, in [0, 1].

    Args:
      pos: [P] scores of the positive examples, which should be the larger ones.
      neg: [N] scores of the negative examples.

    Raises:
      UserError: no scores, or NaN.
    """
    tp, fp = _counts(pos, neg)
    return float(np.sum(np.diff(fp) * (tp[1:] + tp[:-1])) / (2 * tp[-1] * fp[-1]))  # trapezoid, in integers


def average_precision(pos: ArrayLike, neg: ArrayLike) -> float:
    """Area under the precision-recall curve as the step sum Σ (R_n - R_{n-1}) P_n, ties grouped.

    The value of chance is P / (P + N); it moves with the sizes of the two sets.

    Args:
      pos, neg: as for `auroc`.
    """
    tp, fp = _counts(pos, neg)
    return float(np.sum(np.diff(tp) / tp[-1] * tp[1:] / (tp[1:] + fp[1:])))


def fpr_at_recall(pos: ArrayLike, neg: ArrayLike, recall: float = 0.95, rule: Rule = "nearest") -> float:
    """Fraction of negatives at or above the threshold that keeps `recall` of the positives.

    Args:
      pos, neg: as for `auroc`.
      recall: in (0, 1].
      rule: which of the distinct scores is the threshold. "nearest": the one whose recall is nearest,
        even if below, the smallest of several equally near (the official code); "at_least": the largest
        that reaches `recall` (OpenOOD).

    Raises:
      UserError: no scores, or NaN; `recall` or `rule` is not one of those.
    """
    _check_fraction("recall", recall)
    tp, fp = _counts(pos, neg)
    reached = tp[1:] / tp[-1]
    if rule == "at_least":
        chosen = np.argmax(reached >= recall)
    elif rule == "nearest":
        # From the largest threshold of recall 1 upwards: argmin takes the first, hence smallest, of equals.
        first_full = np.argmax(reached == 1)
        chosen = first_full - np.argmin(np.abs(reached[first_full::-1] - recall))
    else:
        raise UserError(f"rule: expected 'nearest' or 'at_least', got {rule!r}.")
    return float(fp[1 + chosen] / fp[-1])


def roc_curve(pos: ArrayLike, neg: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates [D + 1] at every distinct score, from (0, 0) to (1, 1).

    Args:
      pos, neg: as for `auroc`.
    """
    tp, fp = _counts(pos, neg)
    return fp / fp[-1], tp / tp[-1]


def ood_metrics(
    id_scores: ArrayLike,
    ood_scores: ArrayLike,
    positive: Positive = "id",
    rule: Rule = "nearest",
) -> dict[str, float]:
    """FPR95, AUROC and AUPR of a score that is **larger for OOD examples**.

    `positive="id", rule="nearest"` are the definitions of the energy paper, `positive="ood",
    rule="at_least"` those of OpenOOD v1.5. AUROC is the same for both classes, the others are not.

    Args:
      id_scores: [I] scores of in-distribution examples.
      ood_scores: [O] scores of out-of-distribution examples.
      positive: the class that FPR95 and AUPR take as positive; for "id", scores are negated here.
      rule: of `fpr_at_recall`.

    Returns:
      `fpr95`, `auroc` and `aupr`, in [0, 1].

    Raises:
      UserError: no scores, or NaN; an unknown `positive` or `rule`.
    """
    id_scores, ood_scores = _check("id_scores", id_scores), _check("ood_scores", ood_scores)
    if positive not in ("id", "ood"):
        raise UserError(f"positive: expected 'id' or 'ood', got {positive!r}.")
    pos, neg = (-id_scores, -ood_scores) if positive == "id" else (ood_scores, id_scores)
    return {
        "fpr95": fpr_at_recall(pos, neg, recall=0.95, rule=rule),
        "auroc": auroc(pos, neg),
        "aupr": average_precision(pos, neg),
    }


def threshold_at_tpr(id_scores: ArrayLike, tpr: float = 0.95) -> float:
    """Smallest threshold t such that `score <= t` keeps at least `tpr` of the in-distribution examples.

    Args:
      id_scores: [I] held-out scores, larger for OOD.
      tpr: in (0, 1].

    Raises:
      UserError: no scores, or NaN; `tpr` out of range.
    """
    _check_fraction("tpr", tpr)
    id_scores = _check("id_scores", id_scores)
    kept = np.arange(1, id_scores.size + 1) / id_scores.size
    return float(np.sort(id_scores)[np.argmax(kept >= tpr)])


def evaluate_draws(
    key: chex.PRNGKey,
    id_scores: ArrayLike,
    ood_scores: ArrayLike,
    n_ood: int,
    repeats: int = 10,
    positive: Positive = "id",
    rule: Rule = "nearest",
) -> dict[str, float]:
    """`ood_metrics` over random draws of `n_ood` OOD scores, the paper's protocol (its AUPR depends on it).

    Drawing scores is the same as drawing examples and scoring them, and takes one forward pass.

    Args:
      key: a key; each draw is without replacement.
      id_scores: [I], all of them used in every draw. The paper's `n_ood` is I // 5.
      ood_scores: [O].
      n_ood: scores of a draw, at most O.
      repeats: number of draws.
      positive, rule: as for `ood_metrics`.

    Returns:
      The mean of each metric under its name, and the population standard deviation under "<name>_std".

    Raises:
      UserError: `n_ood` is not within 1 and O, or `repeats` below 1; else as `ood_metrics`.
    """
    ood_scores = _check("ood_scores", ood_scores)
    if not 1 <= n_ood <= ood_scores.size:
        raise UserError(f"n_ood: expected 1 to {ood_scores.size}, the OOD examples there are, got {n_ood}.")
    if repeats < 1:
        raise UserError(f"repeats: expected at least 1, got {repeats}.")
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    draws = [
        ood_metrics(id_scores, rng.choice(ood_scores, n_ood, replace=False), positive=positive, rule=rule)
        for _ in range(repeats)
    ]
    values = {name: [draw[name] for draw in draws] for name in draws[0]}
    return {name: float(np.mean(v)) for name, v in values.items()} | {
        f"{name}_std": float(np.std(v)) for name, v in values.items()
    }


def _counts(pos: ArrayLike, neg: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """True and false positives [D + 1] for `score >= t`, t from above the largest to the smallest score."""
    pos, neg = _check("pos", pos), _check("neg", neg)
    distinct, place = np.unique(np.concatenate([pos, neg]), return_inverse=True)
    counts = []
    for places in (place[: pos.size], place[pos.size :]):
        at_score = np.bincount(places, minlength=distinct.size)[::-1]
        counts.append(np.concatenate([[0], np.cumsum(at_score)]))
    return counts[0], counts[1]


def _check(name: str, scores: ArrayLike) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise UserError(f"{name}: expected a 1-D array of at least one score, got shape {scores.shape}.")
    if np.isnan(scores).any():
        row = int(np.argmax(np.isnan(scores)))
        raise UserError(f"{name}: {np.isnan(scores).sum()} of {scores.size} are NaN, the first at row {row}.")
    return scores


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"{name}: expected a fraction in (0, 1], got {value}.")
