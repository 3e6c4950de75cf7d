import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlab.core import UserError
from jaxlab.methods.ood_detection.neighbor_scores import fit_knn, fit_nnguide, knn_score, nnguide_score
from tests.methods.ood_detection.problem import (
    F_TRAIN,
    FIT,
    H_TRAIN,
    SCORED,
    TRAIN,
    Cases,
    F,
    H,
    lse,
)


def _unit(h):
    return h / np.linalg.norm(h, axis=1, keepdims=True)


def _knn(k):
    distances = ((_unit(H)[:, None] - _unit(H_TRAIN)) ** 2).sum(-1)
    return np.sort(distances, axis=1)[:, k - 1]


def _nnguide(k):
    guided = _unit(H) @ (_unit(H_TRAIN) * lse(F_TRAIN)[:, None]).T
    return -lse(F) * np.sort(guided, axis=1)[:, -k:].mean(1)


def _case(fit, score, reference, k, **split):
    fit, score, reference = (
        functools.partial(fit, k=k, **split),
        functools.partial(score, k=k),
        functools.partial(reference, k),
    )
    return fit, score, reference, 1e-5


CASES = {
    "knn": _case(fit_knn, knn_score, _knn, 50),
    "knn, nearest": _case(fit_knn, knn_score, _knn, 1, chunk=13),
    "knn, farthest": _case(fit_knn, knn_score, _knn, TRAIN, chunk=100),
    "knn, in shards": _case(fit_knn, knn_score, _knn, 50, chunk=17, shards=7),
    "nnguide": _case(fit_nnguide, nnguide_score, _nnguide, 100),
    "nnguide, in shards": _case(fit_nnguide, nnguide_score, _nnguide, 10, chunk=17, shards=7),
}
COMPARED = Cases(CASES)


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_the_authors_formula_however_the_bank_is_split(name):
    COMPARED.check(name, jit=True)


def test_scores_equal_the_authors_formula_without_jit():
    COMPARED.check("knn", jit=False)


def test_chunks_are_no_larger_than_asked_and_shards_are_equal():
    assert fit_knn(*FIT, k=1, chunk=100)["bank"].shape == (1, 3, 80, H.shape[1] + 1)
    assert fit_knn(*FIT, k=1, chunk=17, shards=7)["bank"].shape == (7, 3, 12, H.shape[1] + 1)
    assert fit_knn(*FIT, k=1)["bank"].shape == (1, 1, TRAIN, H.shape[1] + 1)


KNN = jax.jit(functools.partial(knn_score, k=20))


def test_eight_devices_with_an_eighth_of_the_bank_each_agree_with_one():
    expected = KNN(fit_knn(*FIT, k=20), *SCORED)
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    state = fit_knn(*FIT, k=20, chunk=12, shards=8)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec("data")))
    assert {shard.data.shape for shard in state["bank"].addressable_shards} == {(1, 3, 10, H.shape[1] + 1)}
    np.testing.assert_allclose(KNN(state, *SCORED), expected, rtol=1e-5, atol=1e-6)


def test_more_examples_than_are_compared_at_a_time():
    queries, logits = (np.tile(x, (32, 1))[:1030] for x in SCORED)
    scores = KNN(fit_knn(*FIT, k=20), queries, logits)
    np.testing.assert_allclose(scores, np.tile(_knn(20), 32)[:1030], rtol=1e-5, atol=1e-5)


def test_features_of_zeros_are_at_a_distance_of_one_from_all_others():
    queries = np.zeros_like(SCORED[0])
    for zeros, expected in ((19, 1), (20, 0)):
        features = FIT[0] * (np.arange(TRAIN) >= zeros)[:, None]
        scores = KNN(fit_knn(features, *FIT[1:], k=20), queries, SCORED[1])
        np.testing.assert_allclose(scores, expected, rtol=1e-6)
    of_zeros = COMPARED.compiled((np.zeros_like(FIT[0]), *FIT[1:]), (queries, SCORED[1]))
    np.testing.assert_array_equal(of_zeros["nnguide"], 0)


@pytest.mark.parametrize("fit", [fit_knn, fit_nnguide])
@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (dict(k=TRAIN + 1), "k: expected 1 to 240, .* got 241"),
        (dict(k=0), "k: expected 1 to 240, .* got 0"),
        (dict(k=1, chunk=0), "chunk: expected 1 or more, got 0"),
        (dict(k=1, shards=0), "shards: expected 1 or more, got 0"),
    ],
)
def test_impossible_choices_are_refused(fit, choice, message):
    with pytest.raises(UserError, match=message):
        fit(*FIT, **choice)
