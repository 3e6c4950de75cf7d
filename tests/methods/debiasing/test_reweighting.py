import collections
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.core import UserError
from jaxlab.methods.debiasing.reweighting import (
    group_weights,
    upweighting,
    weighted_cross_entropy,
    weighted_erm,
)
from jaxlab.nn.mlp import mlp

GROUP_WEIGHTS = jax.jit(group_weights, static_argnums=(2, 3))


def _dataset(size: int = 24) -> dict[str, np.ndarray]:
    """Three classes, of which most examples have the attribute of their class; the last has no attribute 0."""
    rng = np.random.default_rng(3)
    label = rng.integers(0, 3, size).astype(np.int32)
    attribute = np.where(rng.uniform(size=size) < 0.7, label, rng.integers(1, 3, size)).astype(np.int32)
    image = rng.normal(size=(size, 2, 2, 1)).astype(np.float32)
    return {"image": image, "label": label, "attribute": attribute}


def _batch(index: np.ndarray) -> dict[str, np.ndarray]:
    return {**{name: column[index] for name, column in DATASET.items()}, "index": np.int32(index)}


DATASET = _dataset()
NETWORK = mlp(num_classes=3, hidden=(8,))
METHOD = upweighting(NETWORK, optax.sgd(1.0), dataset=DATASET)
UPDATE = jax.jit(METHOD.update)
STATE = jax.jit(METHOD.init)(jax.random.key(0), _batch(np.arange(2)))


def test_weights_are_inverse_to_the_size_of_the_group_and_empty_groups_do_not_count():
    labels, attributes = DATASET["label"], DATASET["attribute"]
    sizes = collections.Counter(zip(labels, attributes))
    assert len(sizes) < 9  # some group is empty
    expected = [24 / (len(sizes) * sizes[group]) for group in zip(labels, attributes)]
    np.testing.assert_allclose(GROUP_WEIGHTS(labels, attributes, 3, 3), expected, rtol=1e-6)


@pytest.mark.parametrize("attributes", [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("num_classes", [1, 4])
def test_weights_have_mean_one_and_the_same_sum_in_every_group(attributes, num_classes):
    labels, attributes = np.zeros(5, np.int32), np.int32(attributes)
    weights = GROUP_WEIGHTS(labels, attributes, num_classes, 5)
    np.testing.assert_allclose(jnp.mean(weights), 1, rtol=1e-6)
    sums = np.bincount(attributes, weights)
    np.testing.assert_allclose(sums[sums > 0], 5 / len(np.unique(attributes)), rtol=1e-6)


def test_the_weighted_loss_is_divided_by_the_number_of_examples():
    logits = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    labels, weight = np.int32([0, 1, 2, 2, 0]), np.float32([2, 0, 0.5, 1, 3])
    p = np.exp(np.float64(logits))
    p /= p.sum(1, keepdims=True)
    value, gradient = jax.jit(jax.value_and_grad(weighted_cross_entropy))(logits, labels, weight)
    np.testing.assert_allclose(value, np.mean(weight * -np.log(p[np.arange(5), labels])), rtol=1e-5)
    expected = weight[:, None] * (p - np.eye(3)[labels]) / 5
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_the_weighted_loss_and_its_gradient_are_finite_for_large_logits():
    value, gradient = jax.jit(jax.value_and_grad(weighted_cross_entropy))(
        jnp.array([[1e4, -1e4]]), jnp.array([1]), jnp.array([3.0])
    )
    assert value == 6e4
    np.testing.assert_array_equal(gradient, [[3, -3]])


def test_updates_agree_with_torch():
    torch = pytest.importorskip("torch")
    state, params = STATE, STATE.variables["params"]
    linears = [torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)]
    with torch.no_grad():
        for linear, name in zip(linears, ("dense1", "head")):
            linear.weight.copy_(torch.tensor(np.asarray(params[name]["kernel"]).T))
            linear.bias.copy_(torch.tensor(np.asarray(params[name]["bias"])))
    net = torch.nn.Sequential(torch.nn.Flatten(), linears[0], torch.nn.ReLU(), linears[1])
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    sizes = collections.Counter(zip(DATASET["label"], DATASET["attribute"]))

    for index in np.split(np.random.default_rng(1).permutation(24), 3):
        batch = _batch(index)
        weight = [24 / (len(sizes) * sizes[g]) for g in zip(batch["label"], batch["attribute"])]
        label = torch.tensor(batch["label"]).long()
        logits = net(torch.tensor(batch["image"]))
        losses = torch.nn.functional.cross_entropy(logits, label, reduction="none")
        loss = (torch.tensor(weight) * losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        state, metrics = UPDATE(state, batch, jax.random.key(1))
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
        np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(1) == label).double().mean())
        np.testing.assert_allclose(metrics["upweighted"], np.mean(np.array(weight) > 1))
        for name, linear in zip(("dense1", "head"), linears):
            ours = state.variables["params"][name]
            np.testing.assert_allclose(ours["kernel"], linear.weight.detach().T, atol=1e-5)
            np.testing.assert_allclose(ours["bias"], linear.bias.detach(), atol=1e-5)


def test_the_mean_step_over_all_batches_is_that_of_the_mean_loss_of_groups():
    pairs = np.array(list(itertools.combinations(range(24), 2)))
    batches = jax.tree.map(lambda *columns: np.stack(columns), *[_batch(pair) for pair in pairs])
    updated, _ = jax.jit(jax.vmap(METHOD.update, (None, 0, None)))(STATE, batches, jax.random.key(1))
    mean_params = jax.tree.map(lambda leaf: leaf.mean(0), updated.variables["params"])

    groups = set(zip(DATASET["label"], DATASET["attribute"]))
    members = np.array([(DATASET["label"] == c) & (DATASET["attribute"] == a) for c, a in groups])

    def mean_of_groups(params):
        logits = NETWORK.apply({"params": params}, DATASET["image"], train=True)[0]["logits"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, DATASET["label"])
        return jnp.mean(members @ losses / members.sum(1))

    params = STATE.variables["params"]
    gradient = jax.jit(jax.grad(mean_of_groups))(params)
    chex.assert_trees_all_close(mean_params, jax.tree.map(np.subtract, params, gradient), atol=1e-6)


def test_an_index_past_the_end_does_not_go_unnoticed():
    batch = {**_batch(np.arange(2)), "index": np.int32([0, 24])}
    assert np.isnan(UPDATE(STATE, batch, jax.random.key(1))[1]["loss"])


def test_the_trained_network_predicts():
    expected = NETWORK.apply(STATE.variables, DATASET["image"], train=False)[0]["logits"]
    np.testing.assert_array_equal(METHOD.predict(STATE, DATASET)["logits"], expected)


def test_the_network_and_the_weights_have_keys_of_their_own():
    network = NETWORK._replace(init=lambda key, inputs: {"params": jax.random.key_data(key)})
    method = weighted_erm(network, optax.sgd(1.0), lambda key, batch: jax.random.key_data(key))
    states = [method.init(jax.random.key(seed), _batch(np.arange(2))) for seed in range(2)]
    assert len({tuple(data.tolist()) for s in states for data in (s.variables["params"], s.weights)}) == 4


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"label": np.arange(2)}, "^dataset: upweighting needs a column 'attribute'"),
        ({"label": np.arange(2), "attributes": np.arange(2)}, "Did you mean 'attributes'"),
        ({"label": np.arange(2), "attribute": np.int32([0, -1])}, "^dataset: 'attribute' is -1 somewhere"),
    ],
)
def test_a_dataset_without_groups_is_refused(dataset, message):
    with pytest.raises(UserError, match=message):
        upweighting(NETWORK, optax.sgd(0.1), dataset=dataset)


def test_batches_without_index_are_refused():
    with pytest.raises(UserError, match="no 'index'"):
        METHOD.init(jax.random.key(0), DATASET)
