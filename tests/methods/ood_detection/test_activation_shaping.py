import functools

import jax
import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.methods.ood_detection.activation_shaping import (
    ash,
    dice_score,
    fit_dice,
    fit_react,
    fit_vra,
    react_score,
    rectify,
    scale,
    vra_score,
)
from tests.methods.ood_detection.problem import (
    FIT,
    H_TRAIN,
    SCORED,
    B,
    Cases,
    H,
    W,
    lse,
)


def _energy(h, weights=W):
    return -lse(h @ weights.T + B)


def _react(percentile):
    return _energy(np.minimum(H, np.percentile(H_TRAIN.flatten(), percentile)))


def _vra(low, high, below=None):
    low, high = np.percentile(H_TRAIN.flatten(), [low, high])
    return _energy(np.where(low > H, low if below is None else below, np.minimum(H, high)))


def _dice(percentile):
    contributions = H_TRAIN.mean(0)[None, :] * W
    return _energy(H, W * (contributions > np.percentile(contributions, percentile)))


CASES = {
    "react": (fit_react, react_score, lambda: _react(90), 1e-5),
    "react_99": (functools.partial(fit_react, percentile=99), react_score, lambda: _react(99), 1e-5),
    "vra": (fit_vra, vra_score, lambda: _vra(10, 90), 1e-5),
    "vra_zero": (
        functools.partial(fit_vra, percentile_low=60, percentile_high=95.5),
        functools.partial(vra_score, below="zero"),
        lambda: _vra(60, 95.5, below=0),
        1e-5,
    ),
    "dice": (fit_dice, dice_score, lambda: _dice(90), 1e-5),
    "dice_50": (functools.partial(fit_dice, percentile=50), dice_score, lambda: _dice(50), 1e-5),
}
COMPARED = Cases(CASES)


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_the_authors_formula(name):
    COMPARED.check(name, jit=True)


@pytest.mark.parametrize("name", ["react", "vra", "dice"])
def test_scores_equal_the_authors_formula_without_jit(name):
    COMPARED.check(name, jit=False)


PERCENTILES = jax.jit(
    lambda x: [
        fit_react(x, None, None, FIT[3], percentile=percentile)["high"]
        for percentile in (0, 12.5, 30, 50, 90, 99.9, 100)
    ]
)


@pytest.mark.parametrize("values", [[1, 2, 3, 4, 5, 6, 7, 8, 100], [2, 2, 2, 2, 2, 2, 7, 7, 7], [0] * 9])
def test_percentiles_are_those_of_numpy_with_ties_and_between_entries(values):
    expected = np.percentile(np.float64(values), (0, 12.5, 30, 50, 90, 99.9, 100))
    np.testing.assert_allclose(PERCENTILES(np.float32(values).reshape(3, 3)), expected, rtol=1e-6)


def test_dice_drops_weights_that_contribute_exactly_the_threshold():
    features, head = np.ones((2, 2), np.float32), (np.float32([[1, 2], [3, 3]]), np.zeros(2, np.float32))
    kernel = fit_dice(features, None, None, head, percentile=50)["kernel"]  # contributions 1, 2, 3, 3
    np.testing.assert_array_equal(kernel, [[0, 0], [3, 3]])
    kernel = fit_dice(features, None, None, head, percentile=100)["kernel"]
    np.testing.assert_array_equal(kernel, 0)


def _shaped(h, variant, percentile):
    """The authors' steps, row by row: what is kept, what is summed, what is written back."""
    shaped = np.zeros_like(h)
    for row, out in zip(h, shaped):
        k = len(row) - int(np.round(len(row) * percentile / 100.0))
        kept = np.argsort(-row, kind="stable")[:k]
        s1, s2 = row.sum(), row[kept].sum()
        if variant == "scale":
            out[:] = row * np.exp(s1 / s2)
        else:
            out[kept] = {"p": row[kept], "s": row[kept] * np.exp(s1 / s2), "b": s1 / k}[variant]
    return shaped


VARIANTS, PRUNED = ("p", "s", "b", "scale"), (0, 65, 90)


def _shape(h, variant, percentile):
    return scale(h, percentile) if variant == "scale" else ash(h, percentile, variant)


@functools.cache
def _all_shaped():
    every = jax.jit(
        lambda h: {(v, percentile): _shape(h, v, percentile) for v in VARIANTS for percentile in PRUNED}
    )
    return every(np.float32(H))


@pytest.mark.parametrize("percentile", PRUNED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_shaped_features_equal_those_of_the_authors(variant, percentile):
    expected = _shaped(H, variant, percentile)
    np.testing.assert_allclose(_all_shaped()[variant, percentile], expected, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shaped_features_equal_those_of_the_authors_without_jit(variant):
    expected = _shaped(H, variant, 65)
    np.testing.assert_allclose(_shape(np.float32(H), variant, 65), expected, rtol=1e-5)


@pytest.mark.parametrize(("size", "percentile", "kept"), [(10, 25, 8), (10, 35, 6), (10, 45, 6), (3, 50, 1)])
def test_the_number_of_pruned_features_is_rounded_half_to_even(size, percentile, kept):
    features = np.arange(1, size + 1, dtype=np.float32)
    assert np.count_nonzero(ash(features, percentile, "p")) == kept


@pytest.mark.parametrize("variant", ["p", "s", "b"])
def test_of_equal_features_the_first_are_kept_and_features_of_zeros_stay_zeros(variant):
    features = np.float32([[1, 2, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
    shaped = np.asarray(ash(features, 50, variant))
    np.testing.assert_array_equal(shaped != 0, [[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])


def test_scale_leaves_features_of_zeros_as_they_are():
    np.testing.assert_array_equal(scale(np.zeros((2, 6), np.float32), 50), 0)


def test_rectified_features_lie_within_their_bounds():
    features = np.float32([-1, 0, 1, 2, 3])
    np.testing.assert_array_equal(rectify(features, 2), [-1, 0, 1, 2, 2])
    np.testing.assert_array_equal(rectify(features, 2, 1), [1, 1, 1, 2, 2])
    np.testing.assert_array_equal(rectify(features, 2, 1, "zero"), [0, 0, 1, 2, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_react(*FIT, percentile=101), "percentile: expected 0 to 100, .* got 101"),
        (lambda: fit_dice(*FIT, percentile=-1), "percentile: expected 0 to 100, .* got -1"),
        (lambda: fit_vra(*FIT, percentile_low=90, percentile_high=10), "ascending order, got 90, 10"),
        (lambda: ash(SCORED[0], 100, "p"), "percentile: 100 leaves none of 16 features"),
        (lambda: ash(SCORED[0], 90, "q"), "variant: expected 'p', 's' or 'b', got 'q'"),
    ],
)
def test_impossible_choices_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
