"""WILDS's metrics agree with scikit-learn and NumPy, and groups are numbered as its grouper numbers them."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import f1_score

from jaxlab.core import UserError
from jaxlab.methods.domain_generalization.wilds import (
    group_ids,
    group_metrics,
    macro_f1,
    percentile_accuracy,
    wilds_evaluation,
)

# --- Groups ---


def test_the_first_column_varies_fastest():
    # The example of WILDS's CombinatorialGrouper: country in {0, 1}, time in {0, 1, 2}.
    pairs = [(country, time) for time in range(3) for country in range(2)]
    country, time = np.array(pairs).T
    y = np.full(6, 7)
    assert group_ids(np.stack([country, y, time], axis=1), (0, 2), (2, 3)).tolist() == [0, 1, 2, 3, 4, 5]
    columns = {"country": country, "time": time}
    assert group_ids(columns, ("country", "time"), (2, 3)).tolist() == [0, 1, 2, 3, 4, 5]
    assert group_ids(columns, ("time", "country"), (3, 2)).tolist() == [0, 3, 1, 4, 2, 5]
    assert group_ids(columns, (), ()).tolist() == [0] * 6


def test_ids_are_one_for_each_combination_under_jit():
    cardinalities = (3, 2, 4)
    metadata = jnp.array(list(itertools.product(*map(range, cardinalities))))
    ids = jax.jit(lambda metadata: group_ids(metadata, (0, 1, 2), cardinalities))(metadata)
    assert ids.dtype == jnp.int32
    assert ids.tolist() == [a + 3 * b + 6 * c for a, b, c in metadata.tolist()]
    assert sorted(ids.tolist()) == list(range(24))


def test_a_value_out_of_range_is_in_no_group():
    ids = group_ids(np.array([[0, 0], [2, 0], [0, -1], [1, 2]]), (0, 1), (2, 3))
    assert ids.tolist() == [0, -1, -1, 5]
    assert group_metrics(np.array([True, False, False, True]), ids, 6)[1].tolist() == [1, 0, 0, 0, 0, 1]


def test_cardinalities_must_fit():
    with pytest.raises(UserError, match="1 for 2 columns"):
        group_ids(np.zeros((1, 2), int), (0, 1), (2,))
    with pytest.raises(UserError, match="2147483648 groups; combine fewer"):
        group_ids(np.zeros((1, 2), int), (0, 1), (2**16, 2**15))


# --- Metrics ---


@pytest.fixture
def examples():
    """Correctness and groups of 200 examples; of 12 groups, 3, 8 and 11 are empty."""
    rng = np.random.default_rng(0)
    group = rng.choice(np.setdiff1d(np.arange(12), [3, 8, 11]), 200)
    return rng.random(200) < 0.2 + 0.05 * group, group


def test_group_metrics_are_means_over_members(examples):
    hit, group = examples
    accuracy, count, worst = jax.jit(group_metrics, static_argnums=2)(hit, group, 12)
    assert count.dtype == jnp.int32
    assert count.tolist() == [(group == g).sum() for g in range(12)]
    for g in range(12):
        if g in (3, 8, 11):
            assert math.isnan(accuracy[g])
        else:
            assert accuracy[g] == pytest.approx(hit[group == g].mean())
    assert worst == pytest.approx(min(hit[group == g].mean() for g in set(group)))


@pytest.mark.parametrize("percentile", [0, 10, 37.5, 50, 100])
def test_a_percentile_is_numpys_over_groups_with_members(examples, percentile):
    hit, group = examples
    expected = np.percentile([hit[group == g].mean() for g in set(group)], percentile)
    found = jax.jit(percentile_accuracy, static_argnums=2)(hit, group, 12, percentile)
    assert found == pytest.approx(expected, abs=1e-6)


def test_without_members_there_is_no_worst_and_no_percentile():
    hit, group = np.zeros(2, bool), np.array([-1, 5])
    accuracy, count, worst = group_metrics(hit, group, 3)
    assert np.isnan(accuracy).all()
    assert count.tolist() == [0, 0, 0]
    assert math.isnan(worst)
    assert math.isnan(percentile_accuracy(hit, group, 3))
    assert group_metrics(np.array([True, False]), np.array([2, 2]), 3)[2] == 0.5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("present", [range(7), (1, 4), (6,)], ids=str)
def test_macro_f1_is_scikit_learns_over_the_classes_among_the_labels(seed, present):
    rng = np.random.default_rng(seed)
    labels = rng.choice(list(present), 60)
    predictions = np.where(rng.random(60) < 0.4, labels, rng.integers(0, 7, 60))
    expected = f1_score(labels, predictions, average="macro", labels=np.unique(labels))
    found = jax.jit(macro_f1, static_argnums=2)(predictions, labels, 7)
    assert found == pytest.approx(expected, abs=1e-6)


def test_macro_f1_at_its_ends():
    labels = np.array([0, 1, 1])
    assert macro_f1(labels, labels, 4) == 1.0
    assert macro_f1(np.array([3, 3, 3]), labels, 4) == 0.0


# --- The evaluator ---


DATASET = {
    "label": np.array([0, 0, 1, 1, 2, 2], np.int32),
    "place": np.array([0, 0, 0, 4, 4, 4], np.int32),
    "year": np.array([9, 9, 2, 2, 2, 2], np.int32),
    "predicted": np.array([0, 1, 1, 1, 0, 2], np.int32),
}


def predict(state, batch):
    return {"logits": jax.nn.one_hot(batch["predicted"], 4)}


def test_the_evaluator_gives_the_metrics_over_the_groups_that_there_are():
    metrics = wilds_evaluation(DATASET, group_by=("place", "year"), percentile=50.0, batch_size=4).evaluate(
        predict, None
    )
    # In the order of the ids, place + 5·year: (0, 2), (4, 2), (0, 9).
    np.testing.assert_allclose(metrics.pop("group_accuracy"), [1, 2 / 3, 1 / 2], rtol=1e-6)
    f1 = f1_score(DATASET["label"], DATASET["predicted"], average="macro")
    assert metrics == pytest.approx(
        {
            "accuracy": 4 / 6,
            "worst_group_accuracy": 0.5,
            "percentile_accuracy": 2 / 3,
            "macro_f1": f1,
        }
    )


def test_the_label_can_be_one_of_the_columns():
    metrics = wilds_evaluation(DATASET, group_by=("place", "label")).evaluate(predict, None)
    np.testing.assert_allclose(metrics["group_accuracy"], [1 / 2, 1, 1, 1 / 2])


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"group_by": ("plaice",)}, "no column 'plaice'. Did you mean 'place'"),
        ({}, {"group_by": ()}, "group_by: empty"),
        ({}, {"group_by": ("place",), "percentile": 101.0}, "expected 0 to 100, got 101"),
        ({"place": np.arange(6) - 1}, {"group_by": ("place",)}, "'place' holds more than integers from 0"),
        ({"place": np.arange(6) / 2}, {"group_by": ("place",)}, "'place' holds more than integers from 0"),
        ({"place": np.zeros((6, 2), int)}, {"group_by": ("place",)}, "'place' holds more than integers"),
        ({"place": np.full(6, 2**30)}, {"group_by": ("place", "year")}, "groups; combine fewer columns"),
    ],
)
def test_what_cannot_be_grouped_is_one_line(changes, arguments, message):
    with pytest.raises(UserError, match=message):
        wilds_evaluation({**DATASET, **changes}, **arguments)
