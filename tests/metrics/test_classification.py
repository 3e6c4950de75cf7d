import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import build
from jaxlab.metrics.classification import (
    classification,
    correct,
    group_accuracy,
    group_counts,
    negative_log_likelihood,
)


def _example(size: int = 200, classes: int = 4, attributes: int = 3):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(size, classes)).astype(np.float32)
    return logits, rng.integers(0, classes, size), rng.integers(0, attributes, size)


class PerExampleTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=False)
    def test_negative_log_likelihood_equals_float64_numpy(self):
        logits, labels, _ = _example()
        wide = 5 * logits.astype(np.float64)
        expected = np.log(np.exp(wide).sum(-1)) - wide[np.arange(len(labels)), labels]
        actual = self.variant(negative_log_likelihood)(jnp.asarray(5 * logits), jnp.asarray(labels))
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True, with_pmap=False)
    def test_any_leading_shape(self):
        logits, labels = jnp.zeros((2, 3, 5)), jnp.zeros((2, 3), jnp.int32)
        for function in (correct, negative_log_likelihood):
            assert self.variant(function)(logits, labels).shape == (2, 3)


@pytest.mark.parametrize(
    ("logits", "label", "expected"),
    [
        ([1e4, 1e4, 1e4, 1e4], 0, np.log(4)),  # the log-sum-exp alone has a spacing of 1e-3 here
        ([1e4, 0.0], 0, 0.0),
        ([1e4, 0.0], 1, 1e4),
        ([0.0, 0.0, -np.inf], 0, np.log(2)),
        ([0.0, 0.0, -np.inf], 2, np.inf),
    ],
)
def test_negative_log_likelihood_at_the_edge(logits, label, expected):
    actual = jax.jit(negative_log_likelihood)(np.float32([logits]), np.asarray([label]))[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_negative_log_likelihood_of_low_precision_logits_is_float32():
    logits = jnp.asarray([[3.0, 1.0]], jnp.bfloat16)
    actual = negative_log_likelihood(logits, jnp.asarray([1]))
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, [2 + np.log1p(np.exp(-2))], rtol=1e-6)


def test_gradient_of_negative_log_likelihood_is_softmax_minus_one_hot():
    logits, labels, _ = _example(size=6)
    gradient = jax.jit(jax.grad(lambda f: negative_log_likelihood(f, labels).sum()))(logits)
    exponentials = np.exp(logits.astype(np.float64))
    expected = exponentials / exponentials.sum(-1, keepdims=True) - np.eye(4)[labels]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_a_label_of_another_shape_is_refused():
    with pytest.raises(AssertionError):
        correct(jnp.zeros((4, 3)), jnp.zeros((4, 1), jnp.int32))


def test_of_equal_logits_the_first_is_the_prediction():
    np.testing.assert_array_equal(correct(jnp.zeros((2, 3)), jnp.asarray([0, 1])), [True, False])


def test_group_accuracy_equals_a_loop_over_groups():
    logits, labels, attributes = _example()
    mask = np.arange(len(labels)) % 3 > 0
    predictions = logits.argmax(-1)
    function = jax.jit(group_accuracy, static_argnames=("num_classes", "num_attributes"))
    actual = function(predictions, labels, attributes, num_classes=4, num_attributes=3, mask=mask)
    assert actual.shape == (4, 3)
    for c in range(4):
        for a in range(3):
            rows = (labels == c) & (attributes == a) & mask
            np.testing.assert_allclose(actual[c, a], np.mean(predictions[rows] == c), rtol=1e-6)


def test_empty_groups_are_nan():
    labels, attributes = jnp.asarray([0, 0, 1, 1, 1]), jnp.asarray([0, 0, 0, 1, 1])
    predictions = jnp.asarray([0, 1, 1, 1, 1])
    sizes = {"num_classes": 2, "num_attributes": 2}
    accuracy = group_accuracy(predictions, labels, attributes, **sizes)
    np.testing.assert_array_equal(accuracy, [[0.5, np.nan], [1, 1]])
    np.testing.assert_array_equal(group_counts(labels, attributes, **sizes), [[2, 0], [1, 2]])


def test_rows_without_a_group_count_nowhere():
    labels, attributes = jnp.asarray([0, 1, 1, 2, -1]), jnp.asarray([0, -1, 2, 0, 1])
    counts = group_counts(labels, attributes, num_classes=2, num_attributes=2)
    np.testing.assert_array_equal(counts, [[1, 0], [0, 0]])


def test_the_evaluator_reports_what_the_columns_allow():
    logits, labels, attributes = _example(size=41)
    attributes[labels == 0] = 1  # leaves groups (0, 0) and (0, 2) empty
    dataset = {"image": logits, "label": labels.astype(np.int32)}

    def predict(state, batch):
        return {"logits": state * batch["image"]}

    plain = build("evaluator", {"name": "classification"}, dataset=dataset).evaluate(jax.jit(predict), 2.0)
    assert set(plain) == {"accuracy", "nll", "ece"}
    hit = logits.argmax(-1) == labels
    np.testing.assert_allclose(plain["accuracy"], hit.mean(), rtol=1e-6)

    evaluator = classification(dataset | {"attribute": attributes}, batch_size=16)
    grouped = evaluator.evaluate(jax.jit(predict), 2.0)
    assert all(grouped[name] == plain[name] for name in plain)
    groups = {(c, a): hit[(labels == c) & (attributes == a)] for c in range(4) for a in range(3)}
    expected = [group.mean() if len(group) else np.nan for group in groups.values()]
    np.testing.assert_allclose(grouped["group_accuracy"], expected, rtol=1e-6)
    np.testing.assert_allclose(grouped["unbiased_accuracy"], np.nanmean(expected), rtol=1e-6)
    np.testing.assert_allclose(grouped["worst_group_accuracy"], np.nanmin(expected), rtol=1e-6)
    assert grouped["empty_groups"] == 2
