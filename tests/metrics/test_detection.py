import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from jaxlab.core import UserError
from jaxlab.metrics.detection import (
    auroc,
    average_precision,
    evaluate_draws,
    fpr_at_recall,
    ood_metrics,
    roc_curve,
    threshold_at_tpr,
)


def _scores(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Positive and negative scores, float32 as a network gives them."""
    rng = np.random.default_rng(sum(map(ord, case)))
    pos, neg = rng.normal(0.8, 1, 211), rng.normal(0, 1, 97)
    if case == "ties":
        pos, neg = np.round(pos), np.round(neg)
    elif case == "large":  # a float32 sigmoid of these is 1 for all
        pos, neg = 1e6 + pos, 1e6 + neg
    elif case == "tiny":
        pos, neg = 1e-30 * pos, 1e-30 * neg
    return pos.astype(np.float32), neg.astype(np.float32)


CASES = ["plain", "ties", "large", "tiny"]


@pytest.mark.parametrize("case", CASES)
def test_areas_agree_with_scikit_learn(case):
    pos, neg = _scores(case)
    truth = np.r_[np.ones(len(pos)), np.zeros(len(neg))]
    scores = np.r_[pos, neg]
    np.testing.assert_allclose(auroc(pos, neg), roc_auc_score(truth, scores), rtol=1e-12)
    np.testing.assert_allclose(
        average_precision(pos, neg), average_precision_score(truth, scores), rtol=1e-12
    )


def test_auroc_is_the_probability_of_the_right_order_with_ties_counted_half():
    pos, neg = _scores("ties")
    above = np.mean(pos[:, None] > neg) + np.mean(pos[:, None] == neg) / 2
    np.testing.assert_allclose(auroc(pos, neg), above, rtol=1e-12)


def test_hand_made_cases():
    assert auroc([2, 3], [0, 1]) == 1.0
    assert auroc([0, 1], [2, 3]) == 0.0
    assert auroc([5, 5, 5], [5, 5]) == 0.5
    assert average_precision([5, 5, 5], [5, 5]) == 0.6
    # Descending: + - + -. AP = 1/2 * 1 + 1/2 * 2/3.
    np.testing.assert_allclose(average_precision([4, 2], [3, 1]), 1 / 2 + 1 / 3)
    assert auroc([4, 2], [3, 1]) == 0.75
    fpr, tpr = roc_curve([4, 2], [3, 1])
    np.testing.assert_array_equal(fpr, [0, 0, 0.5, 0.5, 1])
    np.testing.assert_array_equal(tpr, [0, 0.5, 0.5, 1, 1])


def _fpr95_step_by_step(pos: np.ndarray, neg: np.ndarray, recall_level: float) -> float:
    """The steps of the official code, one by one."""
    y_true = np.r_[np.ones(len(pos)), np.zeros(len(neg))]
    y_score = np.r_[pos, neg]
    order = np.argsort(y_score, kind="mergesort")[::-1]
    y_score, y_true = y_score[order], y_true[order]
    last_of_run = np.r_[np.where(np.diff(y_score))[0], y_true.size - 1]
    tps = np.cumsum(y_true, dtype=np.float64)[last_of_run]
    fps = 1 + last_of_run - tps
    recall = tps / tps[-1]
    last = tps.searchsorted(tps[-1])
    backwards = slice(last, None, -1)
    recall, fps = np.r_[recall[backwards], 1], np.r_[fps[backwards], 0]
    return fps[np.argmin(np.abs(recall - recall_level))] / len(neg)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("level", [0.05, 0.5, 0.8, 0.95, 1.0])
def test_fpr_at_the_nearest_recall_follows_the_official_steps(case, level):
    pos, neg = _scores(case)
    assert fpr_at_recall(pos, neg, recall=level) == _fpr95_step_by_step(pos, neg, level)


@pytest.mark.parametrize("size", [1, 3, 10, 20, 21, 30, 50])
def test_fpr_at_the_nearest_recall_follows_the_official_steps_for_few_positives(size):
    rng = np.random.default_rng(size)
    pos, neg = rng.normal(0.5, 1, size), rng.normal(0, 1, 40)
    assert fpr_at_recall(pos, neg) == _fpr95_step_by_step(pos, neg, 0.95)


def test_the_two_rules_part_where_the_nearest_recall_is_below():
    pos, neg = np.arange(10, 20), [10, 5]  # one negative ties with the positive between recall 0.9 and 1
    assert abs(0.9 - 0.95) < abs(1.0 - 0.95)  # by rounding alone
    assert fpr_at_recall(pos, neg, rule="nearest") == 0.0
    assert fpr_at_recall(pos, neg, rule="at_least") == 0.5


@pytest.mark.parametrize(("rule", "expected"), [("nearest", 1.0), ("at_least", 0.5)])
def test_of_thresholds_of_one_recall_the_nearest_takes_the_smallest_and_at_least_the_largest(rule, expected):
    # 19 of 20 lie at or above both 1 and 0.5, 1 of 2 negatives above 1.
    assert fpr_at_recall(np.arange(20), [0.5, 1.5], rule=rule) == expected


def test_chance_is_five_sixths_of_aupr_at_five_to_one_and_one_sixth_the_other_way():
    rng = np.random.default_rng(0)
    id_scores, ood_scores = rng.normal(size=50_000), rng.normal(size=10_000)
    as_id = ood_metrics(id_scores, ood_scores, positive="id")
    as_ood = ood_metrics(id_scores, ood_scores, positive="ood")
    np.testing.assert_allclose([as_id["aupr"], as_ood["aupr"]], [5 / 6, 1 / 6], atol=0.01)
    np.testing.assert_allclose([as_id["fpr95"], as_id["auroc"]], [0.95, 0.5], atol=0.01)


@pytest.mark.parametrize("rule", ["nearest", "at_least"])
def test_ood_metrics_negate_scores_where_id_is_positive(rule):
    id_scores, ood_scores = _scores("plain")  # larger for ID here: a wrong-way score
    as_id = ood_metrics(id_scores, ood_scores, positive="id", rule=rule)
    as_ood = ood_metrics(id_scores, ood_scores, positive="ood", rule=rule)
    assert as_id["auroc"] < 0.5
    np.testing.assert_allclose(as_id["auroc"], as_ood["auroc"], rtol=1e-12)
    assert as_id["fpr95"] == fpr_at_recall(-id_scores, -ood_scores, rule=rule)
    assert as_id["aupr"] == average_precision(-id_scores, -ood_scores)
    assert as_ood["fpr95"] == fpr_at_recall(ood_scores, id_scores, rule=rule)
    assert as_ood["aupr"] == average_precision(ood_scores, id_scores)


def test_adjacent_floats_are_distinct_scores():
    low = np.float32(1e4)
    high = np.nextafter(low, np.float32(np.inf))
    assert auroc([high] * 3, [low] * 3) == 1.0
    assert auroc(jnp.asarray([high, high]), jnp.asarray([low])) == 1.0


def test_infinite_scores_rank_beyond_all_others():
    assert auroc([np.inf, 1], [0, -np.inf]) == 1.0
    assert auroc([np.inf], [np.inf]) == 0.5
    assert ood_metrics([-np.inf, 0, 0], [1, np.inf]) == {"fpr95": 0.0, "auroc": 1.0, "aupr": 1.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auroc([], [1.0]), r"pos: expected a 1-D array of at least one score, got shape \(0,\)"),
        (lambda: auroc([1.0], np.ones((2, 1))), "neg: expected a 1-D array"),
        (lambda: ood_metrics([0.0, np.nan], [1.0]), "id_scores: 1 of 2 are NaN, the first at row 1"),
        (lambda: ood_metrics([0.0], [np.nan]), "ood_scores: 1 of 1 are NaN"),
        (lambda: ood_metrics([0.0], [1.0], positive="OOD"), "positive: expected 'id' or 'ood', got 'OOD'"),
        (lambda: ood_metrics([0.0], [1.0], rule="exact"), "rule: expected 'nearest' or 'at_least'"),
        (lambda: fpr_at_recall([0.0], [1.0], recall=95), r"recall: expected a fraction in \(0, 1\], got 95"),
        (lambda: threshold_at_tpr([0.0], 0), "tpr: expected a fraction"),
        (
            lambda: evaluate_draws(jax.random.key(0), [0.0], [1.0], n_ood=2),
            "n_ood: expected 1 to 1, .* got 2",
        ),
        (lambda: evaluate_draws(jax.random.key(0), [0.0], [1.0], n_ood=1, repeats=0), "repeats: .* got 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize("tpr", [0.07, 0.5, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("size", [1, 7, 20, 100])
def test_threshold_is_the_smallest_that_keeps_the_fraction(size, tpr):
    scores = np.random.default_rng(size).permutation(size).astype(float)
    threshold = threshold_at_tpr(scores, tpr)
    assert np.sum(scores <= threshold) / size >= tpr
    assert np.sum(scores < threshold) / size < tpr


def test_draws_of_every_score_equal_the_full_set_and_do_not_vary():
    id_scores, ood_scores = _scores("plain")
    drawn = evaluate_draws(jax.random.key(0), id_scores, ood_scores, n_ood=len(ood_scores), repeats=3)
    for name, value in ood_metrics(id_scores, ood_scores).items():
        np.testing.assert_allclose([drawn[name], drawn[f"{name}_std"]], [value, 0], atol=1e-12)


def test_draws_are_without_replacement_differ_and_follow_the_key():
    # One OOD score lies below the ID scores: drawn (3 times in 4) it alone is wrong, else none is.
    id_scores, ood_scores = np.ones(5), np.array([0.0, 2, 3, 4])
    drawn = evaluate_draws(jax.random.key(1), id_scores, ood_scores, n_ood=3, repeats=200)
    np.testing.assert_allclose(drawn["auroc"], 3 / 4 * 2 / 3 + 1 / 4, atol=0.04)
    # Two values a third apart, so the population deviation is sqrt(p (1 - p)) / 3.
    p = (drawn["auroc"] - 2 / 3) * 3
    np.testing.assert_allclose(drawn["auroc_std"], np.sqrt(p * (1 - p)) / 3, rtol=1e-6)
    once, again, other = (
        evaluate_draws(jax.random.key(k), id_scores, ood_scores, n_ood=3, repeats=7) for k in (0, 0, 5)
    )
    assert once == again != other


def test_arguments_may_be_given_in_order():
    id_scores, ood_scores = np.arange(20.0), np.arange(10.0, 30.0)
    assert (
        fpr_at_recall(-id_scores, -ood_scores, 0.95, "nearest")
        == ood_metrics(id_scores, ood_scores, "id")["fpr95"]
    )
    by_name = evaluate_draws(jax.random.key(0), id_scores, ood_scores, n_ood=5, repeats=3)
    assert evaluate_draws(jax.random.key(0), id_scores, ood_scores, 5, 3) == by_name
