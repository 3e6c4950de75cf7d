import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.core import UserError
from jaxlab.methods.supervised.erm import erm
from jaxlab.methods.transfer import evaluation, image_domains
from jaxlab.methods.transfer.fine_tune import fine_tune
from tests.methods.transfer import problem

RNG = np.random.default_rng(0)


def test_movement_is_the_distance_of_each_example_and_has_a_gradient_where_nothing_moved():
    f0, f1 = RNG.normal(size=(5, 3)), RNG.normal(size=(5, 3))
    f1[2] = f0[2]
    with jax.enable_x64(True):
        moved = evaluation.feature_movement(jnp.asarray(f0), jnp.asarray(f1))
        gradient = jax.grad(lambda x: evaluation.feature_movement(jnp.asarray(f0), x).sum())(jnp.asarray(f1))
    np.testing.assert_allclose(moved, np.linalg.norm(f1 - f0, axis=1), rtol=1e-13)
    np.testing.assert_array_equal(gradient[2], 0)
    np.testing.assert_allclose(gradient[0], (f1 - f0)[0] / np.linalg.norm((f1 - f0)[0]), rtol=1e-13)
    with pytest.raises(AssertionError):
        evaluation.feature_movement(f0, f1[:1])


def test_accuracy_may_be_restricted_to_some_classes():
    logits = jnp.array([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0], [0.0, -5.0, -6.0]])
    labels = jnp.array([1, 1, 1])
    assert evaluation.accuracy(logits, labels) == 0
    np.testing.assert_allclose(jax.jit(lambda x: evaluation.accuracy(x, labels, [1, 2]))(logits), 2 / 3)
    for classes in ([], [3], [-1]):
        with pytest.raises(UserError, match="valid_classes"):
            evaluation.accuracy(logits, labels, classes)


def test_selection_takes_the_first_or_the_last_of_the_best():
    nan = float("nan")
    table = [dict(rate=r, id=v, ood=o) for r, v, o in [(1, nan, 9), (2, 0.5, 1), (3, 0.7, 2), (4, 0.7, 8)]]
    assert evaluation.select_on(table, "id")["rate"] == 3
    assert evaluation.select_on(table, "id", first_max=False)["rate"] == 4
    with pytest.raises(UserError, match="'di'. Did you mean 'id'"):
        evaluation.select_on(table, "di")
    for empty in ([], table[:1]):
        with pytest.raises(UserError, match="no row"):
            evaluation.select_on(empty, "id")


def test_evaluators_measure_each_set_and_their_mean():
    method = fine_tune(problem.NETWORK, optax.sgd(0.3))
    state, _ = problem.run(method, 5)
    dataset, ood = problem.batch(7, 30), {"a": problem.batch(8, 21), "b": problem.batch(9, 10)}
    predict = jax.jit(method.predict)
    accuracy = evaluation.shifted_accuracy(
        dataset, ood, validation=ood["a"], batch_size=16, valid_classes={"b": (0, 1)}
    )
    found = accuracy.evaluate(predict, state)

    def hits(columns, classes=3):
        logits = np.asarray(predict(state, columns)["logits"])[:, :classes]
        return np.mean(logits.argmax(1) == columns["label"])

    np.testing.assert_allclose(found["id_accuracy"], hits(dataset), rtol=1e-6)
    np.testing.assert_allclose(found["validation_accuracy"], found["domains/a/accuracy"])
    np.testing.assert_allclose(found["domains/b/accuracy"], hits(ood["b"], 2), rtol=1e-6)
    np.testing.assert_allclose(found["ood_accuracy"], (hits(ood["a"]) + hits(ood["b"], 2)) / 2, rtol=1e-6)
    summary = {name: {"mean": value, "stderr": np.nan} for name, value in found.items()}
    assert set(accuracy.plot(summary)) == {"domains"}

    moved = evaluation.feature_distortion(dataset, ood, batch_size=16).evaluate(predict, state)
    features = [
        problem.NETWORK.apply(v, dataset["image"], train=False)[0]["features"]
        for v in (state.initial, state.variables)
    ]
    expected = np.linalg.norm(np.asarray(features[1]) - np.asarray(features[0]), axis=1).mean()
    np.testing.assert_allclose(moved["id_movement"], expected, rtol=1e-5)
    np.testing.assert_allclose(
        moved["ood_movement"], (moved["domains/a/movement"] + moved["domains/b/movement"]) / 2
    )


def test_what_cannot_be_evaluated_is_refused():
    data = problem.batch()
    with pytest.raises(UserError, match="at least one"):
        evaluation.shifted_accuracy(data, {})
    with pytest.raises(UserError, match="no shifted set 'c'"):
        evaluation.shifted_accuracy(data, {"b": data}, valid_classes={"c": (0,)})
    state = erm(problem.NETWORK, optax.sgd(0.1)).init(problem.KEY, data)
    with pytest.raises(UserError, match="no 'initial'"):
        evaluation.feature_distortion(data, {"b": data}).evaluate(None, state)


def test_labels_of_another_data_set_drop_what_it_has_not():
    data = {"image": np.arange(4), "label": np.array([2, 0, 1, 2])}
    found = image_domains.relabelled(data, labels=(5, -1, 3))
    np.testing.assert_array_equal(found["label"], [3, 5, 3])
    np.testing.assert_array_equal(found["image"], [0, 1, 3])
    with pytest.raises(UserError, match="2 labels, but the data set has class 2"):
        image_domains.relabelled(data, labels=(5, -1))


def test_domains_invert_and_transpose():
    image = RNG.integers(0, 256, (2, 3, 3, 1)).astype(np.uint8)
    data = {"image": image, "label": np.arange(2)}
    both = image_domains.in_domain(data, domain="inverted_transposed")
    np.testing.assert_array_equal(both["image"], 255 - image.transpose(0, 2, 1, 3))
    assert both["image"].dtype == np.uint8
    every = image_domains.in_all_domains(data)
    assert every["image"].shape == (8, 3, 3, 1)
    np.testing.assert_array_equal(every["label"], [0, 1] * 4)
    np.testing.assert_array_equal(every["domain"], [0, 0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(every["image"][2:4], 255 - image)
    for bad, message in (
        (dict(domain="mirrored"), "no domain"),
        (dict(domain="inverted", maximum=1.0), "not 0..1"),
    ):
        with pytest.raises(UserError, match=message):
            image_domains.in_domain(data, **bad)
    with pytest.raises(UserError, match="not square"):
        image_domains.in_domain({"image": image[:, :2]}, domain="transposed")
