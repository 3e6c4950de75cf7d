import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.core import UserError
from jaxlab.data.transforms import standardize
from jaxlab.methods.debiasing.jtt import error_set, error_weights, jtt
from jaxlab.nn.mlp import mlp

SIZE = 14
KEY = jax.random.key(0)
MLP = mlp(num_classes=3, hidden=(8,))
NETWORK = MLP._replace(init=lambda key, inputs: START)  # compiles faster than random numbers do
TRANSFORMS = (standardize(scale=16.0, mean=(0.5,), std=(0.3,)),)
FIRST_NETWORK = mlp(num_classes=3, hidden=())


def _dataset() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 17, (SIZE, 2, 2, 1), dtype=np.uint8)
    return {"image": image, "label": rng.integers(0, 3, SIZE).astype(np.int32)}


def _input(image: np.ndarray) -> np.ndarray:
    return (np.float32(image) / 16 - np.float32(0.5)) / np.float32(0.3)


def _batch(index: np.ndarray) -> dict[str, np.ndarray]:
    columns = {"image": _input(DATASET["image"])[index], "label": DATASET["label"][index]}
    return {**columns, "index": np.int32(index)}


def _make(variables, network=NETWORK, **keys):
    keys = {"dataset": DATASET, "upweight": 5.0, "batch_size": 4, "transforms": TRANSFORMS, **keys}
    first = FIRST_NETWORK._replace(init=lambda key, inputs: variables)  # as it is handed over
    return jtt(network, first, optax.sgd(1.0), **keys)


@jax.jit
def _init(variables, key):
    return _make(variables).init(key, BATCH)


def _wrong(variables) -> np.ndarray:
    """The error set, one example after the other in NumPy."""
    head = jax.tree.map(np.asarray, variables["params"]["head"])
    wrong = []
    for image, label in zip(DATASET["image"], DATASET["label"]):
        logits = _input(image).reshape(-1) @ head["kernel"] + head["bias"]
        wrong.append(np.argmax(logits) != label)
    return np.array(wrong)


DATASET = _dataset()
BATCH = _batch(np.arange(4))
START = jax.jit(MLP.init)(KEY, BATCH["image"])
STACKED = jax.jit(jax.vmap(FIRST_NETWORK.init, (0, None)))(jax.random.split(KEY, 3), BATCH["image"])
VARIABLES = [jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), STACKED) for i in range(3)]
METHOD = _make(VARIABLES[0])
STATE = _init(VARIABLES[0], KEY)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 14, 512])
def test_the_error_set_is_that_of_a_literal_loop_for_any_batch_size(batch_size):
    expected = _wrong(VARIABLES[0])
    assert 0 < expected.sum() < SIZE
    wrong = error_set(FIRST_NETWORK, VARIABLES[0], DATASET, batch_size=batch_size, transforms=TRANSFORMS)
    np.testing.assert_array_equal(wrong, expected)


def test_the_first_classifier_is_in_evaluation_mode():
    network = mlp(num_classes=3, hidden=(8,), norm="batch_norm", dropout_rate=0.5)
    variables = jax.jit(network.init)(KEY, BATCH["image"])

    @jax.jit
    def wrong_and_predicted(shift):
        shifted = jax.tree.map(lambda statistic: statistic + shift, variables["batch_stats"])
        moved = {**variables, "batch_stats": shifted}
        wrong = error_set(network, moved, DATASET, batch_size=3, transforms=TRANSFORMS)
        logits = network.apply(moved, _input(DATASET["image"]), train=False)[0]["logits"]
        return wrong, logits.argmax(1)

    (before, _), (after, predicted) = wrong_and_predicted(0.0), wrong_and_predicted(0.7)
    np.testing.assert_array_equal(after, predicted != DATASET["label"])
    assert np.any(before != after)


@pytest.mark.parametrize("upweight", [1.0, 3.7, 100.0])
def test_weights_are_the_shares_of_the_upsampled_data_set(upweight):
    wrong = np.array([True, False, False, True, False, False, False])
    copies = np.where(wrong, upweight, 1.0)
    weights = jax.jit(error_weights)(wrong, upweight)
    np.testing.assert_allclose(weights, 7 * copies / copies.sum(), rtol=1e-6)
    np.testing.assert_allclose(jnp.mean(weights), 1, rtol=1e-6)


@pytest.mark.parametrize("upweight", [1.0, 3.7, 1e6])
@pytest.mark.parametrize("wrong", [False, True])
def test_all_weights_are_one_where_none_or_all_are_wrong(wrong, upweight):
    weights = jax.jit(error_weights)(np.full(7, wrong), upweight)
    np.testing.assert_allclose(weights, 1, rtol=1e-6)
    if not wrong:
        np.testing.assert_array_equal(weights, 1)


@pytest.mark.parametrize("answer", [0, 1])
def test_a_first_classifier_without_errors_or_with_nothing_else_leaves_the_plain_loss(answer):
    zeros = jax.tree.map(np.zeros_like, VARIABLES[0]["params"]["head"])
    variables = {"params": {"head": {**zeros, "bias": np.eye(3, dtype=np.float32)[answer]}}}
    labels = np.zeros(SIZE, np.int32)
    method = _make(variables, dataset={**DATASET, "label": labels})
    batch = {**BATCH, "label": labels[:4]}

    @jax.jit
    def first_losses(key):
        state = method.init(key, batch)
        logits = NETWORK.apply(state.variables, batch["image"], train=True)[0]["logits"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return state.weights, method.update(state, batch, key)[1]["loss"], losses.mean()

    weights, loss, expected = first_losses(KEY)
    np.testing.assert_allclose(weights, 1, rtol=1e-6)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_init_weighs_the_errors_of_what_is_handed_over():
    for variables in VARIABLES:
        wrong = _wrong(variables)
        weights = np.where(wrong, 5, 1) * SIZE / (SIZE + 4 * wrong.sum())
        np.testing.assert_allclose(_init(variables, KEY).weights, weights, rtol=1e-6)


def test_the_second_classifier_starts_afresh():
    init = jax.jit(_make(VARIABLES[0], network=MLP).init)
    states = [init(jax.random.key(seed), BATCH) for seed in range(2)]
    chex.assert_trees_all_equal_shapes_and_dtypes(states[0].variables, START)
    kernels = [state.variables["params"]["head"]["kernel"] for state in states]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1


def test_replicas_have_the_weights_of_their_own_first_classifiers():
    keys = jax.random.split(KEY, 3)
    states = jax.jit(jax.vmap(_init))(STACKED, keys)
    alone = [_init(variables, key) for variables, key in zip(VARIABLES, keys)]
    chex.assert_trees_all_close(states, jax.tree.map(lambda *leaves: np.stack(leaves), *alone), rtol=1e-6)
    assert len({tuple(np.asarray(weights)) for weights in states.weights}) == 3


def test_memory_of_the_pass_is_bounded_by_the_batch():
    jaxpr = jax.make_jaxpr(METHOD.init)(KEY, BATCH)
    (loop,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    products = [e for e in loop.params["jaxpr"].jaxpr.eqns if e.primitive.name == "dot_general"]
    assert [product.outvars[0].aval.shape for product in products] == [(4, 3)]


def test_updates_agree_with_torch():
    torch = pytest.importorskip("torch")
    update, state = jax.jit(METHOD.update), STATE
    linears = [torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)]
    with torch.no_grad():
        for linear, name in zip(linears, ("dense1", "head")):
            params = state.variables["params"][name]
            linear.weight.copy_(torch.tensor(np.asarray(params["kernel"]).T))
            linear.bias.copy_(torch.tensor(np.asarray(params["bias"])))
    net = torch.nn.Sequential(torch.nn.Flatten(), linears[0], torch.nn.ReLU(), linears[1])
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    wrong = _wrong(VARIABLES[0])
    weights = torch.tensor(np.where(wrong, 5, 1) / np.where(wrong, 5, 1).mean())

    for index in np.split(np.random.default_rng(1).permutation(SIZE), 2):
        batch = _batch(index)
        label = torch.tensor(batch["label"]).long()
        logits = net(torch.tensor(batch["image"]))
        losses = torch.nn.functional.cross_entropy(logits, label, reduction="none")
        loss = (weights[index] * losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        state, metrics = update(state, batch, jax.random.key(1))
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
        np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(1) == label).double().mean())
        np.testing.assert_allclose(metrics["upweighted"], wrong[index].mean())
        for name, linear in zip(("dense1", "head"), linears):
            ours = state.variables["params"][name]
            np.testing.assert_allclose(ours["kernel"], linear.weight.detach().T, atol=1e-5)
            np.testing.assert_allclose(ours["bias"], linear.bias.detach(), atol=1e-5)
    assert update._cache_size() == 1


def test_the_expected_gradient_is_that_of_the_upsampled_data_set():
    """Over every batch of two, of the weighted data set and of the one with five copies of each error."""

    def mean_step(members: np.ndarray, weights: np.ndarray):
        pairs = np.array(list(itertools.combinations(members, 2)))
        batches = jax.tree.map(lambda *columns: np.stack(columns), *[_batch(pair) for pair in pairs])
        state = STATE._replace(weights=weights)
        updated, _ = jax.jit(jax.vmap(METHOD.update, (None, 0, None)))(state, batches, KEY)
        return jax.tree.map(lambda new, old: new.mean(0) - old, updated.variables, state.variables)

    weighted = mean_step(np.arange(SIZE), STATE.weights)
    copies = np.repeat(np.arange(SIZE), np.where(_wrong(VARIABLES[0]), 5, 1))
    upsampled = mean_step(copies, np.ones(SIZE, np.float32))
    plain = mean_step(np.arange(SIZE), np.ones(SIZE, np.float32))
    chex.assert_trees_all_close(weighted, upsampled, atol=1e-6)
    assert np.abs(weighted["params"]["head"]["bias"] - plain["params"]["head"]["bias"]).max() > 1e-2


@pytest.mark.parametrize("upweight", [0.5, float("nan"), float("inf")])
def test_an_upweight_out_of_range_is_refused(upweight):
    with pytest.raises(UserError, match=r"^upweight: expected a number that is at least 1"):
        _make(VARIABLES[0], upweight=upweight)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(UserError, match="^batch_size: expected at least 1, got 0"):
        _make(VARIABLES[0], batch_size=0)


def test_batches_without_index_are_refused():
    with pytest.raises(UserError, match="no 'index'"):
        METHOD.init(KEY, {"image": BATCH["image"], "label": BATCH["label"]})
