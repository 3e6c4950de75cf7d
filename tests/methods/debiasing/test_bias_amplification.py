import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.core import UserError
from jaxlab.data.coloring import MEAN_COLOR, colored_digits
from jaxlab.data.transforms import standardize
from jaxlab.methods.debiasing.bias_amplification import (
    BiasDefinition,
    aligned_copy,
    amplified_erm,
    amplified_lff,
    amplified_share,
    bias_ensemble,
    bias_only,
    biased_ensemble,
    disentangled_bias_ensemble,
    estimate_aligned_attr,
    none,
    recoloring,
    select_aligned,
    select_by_agreement,
    two_stage_lff,
    variant_lookup,
)
from jaxlab.methods.debiasing.disentangled import DisentangledState, disentangled_update
from jaxlab.methods.debiasing.lff import lff
from jaxlab.nn.ensemble import ensemble
from jaxlab.nn.mlp import mlp

CLASSES = 3
NETWORK = mlp(num_classes=CLASSES, hidden=(8,))
ALIGNED = np.array([2, 0, 1], np.int32)


def _set_first_pixel(key, batch, attr):
    noise = 0.01 * jax.random.normal(key, attr.shape)
    return {**batch, "image": batch["image"].at[:, 0, 0, 0].set(attr + noise)}


DEFINITION = BiasDefinition(CLASSES, _set_first_pixel, ALIGNED)


def _problem(size=24):
    rng = np.random.default_rng(3)
    label = rng.integers(0, CLASSES, size).astype(np.int32)
    attribute = rng.integers(0, CLASSES, size).astype(np.int32)
    image = rng.normal(size=(size, 2, 2, 1)).astype(np.float32)
    image[:, 0, 0, 0] = attribute
    dataset = {"image": image, "label": label, "attribute": attribute}
    order = np.concatenate([rng.permutation(size) for _ in range(2)])
    batches = [
        {name: column[index] for name, column in dataset.items()} | {"index": index.astype(np.int32)}
        for index in np.split(order, 6)
    ]
    return dataset, batches


DATASET, BATCHES = _problem()


def _run(method, steps=6, key=0):
    state = jax.jit(method.init)(jax.random.key(key), BATCHES[0])
    update = jax.jit(method.update)
    history = []
    for i, batch in enumerate(BATCHES[:steps]):
        state, metrics = update(state, batch, jax.random.key(i))
        history.append(metrics)
    assert update._cache_size() == 1
    return state, history


def _handed_over(network, variables):
    return network._replace(init=lambda key, inputs: variables)


def test_with_strength_zero_and_the_generalised_cross_entropy_it_is_lff_to_the_bit():
    network = mlp(num_classes=CLASSES, hidden=(8,), norm="batch_norm", dropout_rate=0.1)
    shared = dict(dataset=DATASET, num_classes=CLASSES)
    ours = amplified_lff(
        network,
        optax.adam(1e-2),
        definition=DEFINITION,
        p=0.0,
        biased_loss="generalized_cross_entropy",
        **shared,
    )
    chex.assert_trees_all_equal(_run(ours), _run(lff(network, optax.adam(1e-2), **shared)))


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_an_aligned_copy_has_the_attribute_of_its_class_and_all_else_as_it_was(p):
    count = 4000
    x = {"image": jax.random.normal(jax.random.key(1), (count, 2, 2, 1)), "id": jnp.arange(count)}
    y = jax.random.randint(jax.random.key(2), (count,), 0, CLASSES)
    made, labels, mask = jax.jit(functools.partial(aligned_copy, definition=DEFINITION, p=p))(
        jax.random.key(0), x, y
    )
    np.testing.assert_array_equal(labels, y)
    assert mask.all()
    np.testing.assert_array_equal(made["id"], x["id"])
    np.testing.assert_array_equal(
        made["image"].reshape(count, -1)[:, 1:], x["image"].reshape(count, -1)[:, 1:]
    )
    pixel, before = made["image"][:, 0, 0, 0], x["image"][:, 0, 0, 0]
    synthetic = pixel != before
    assert abs(synthetic.mean() - p) < 0.03
    np.testing.assert_allclose(pixel[synthetic], ALIGNED[y][synthetic], atol=0.06)
    if p == 1:
        assert len(np.unique(pixel)) > count / 2  # its noise is drawn anew for each example


def test_bias_only_leaves_the_attribute_alone_to_tell_the_label():
    count = 6000
    x = {"image": jnp.zeros((count, 2, 2, 1)), "content": jnp.arange(count) % CLASSES}
    y = x["content"]
    made, labels, mask = bias_only(jax.random.key(0), x, y, DEFINITION, 1.0)
    assert mask.all()
    np.testing.assert_allclose(made["image"][:, 0, 0, 0], ALIGNED[labels], atol=0.06)
    table = np.zeros((CLASSES, CLASSES))
    np.add.at(table, (np.asarray(labels), np.asarray(x["content"])), 1)
    np.testing.assert_allclose(table / count, 1 / 9, atol=0.02)
    made, labels, _ = bias_only(jax.random.key(0), x, y, DEFINITION, 0.25)
    real = made["image"][:, 0, 0, 0] == 0
    np.testing.assert_array_equal(labels[real & (y != 1)], y[real & (y != 1)])  # attribute 0 is class 1's


def test_synthesisers_take_plain_arrays_too():
    definition = BiasDefinition(CLASSES, lambda key, x, attr: x + attr[:, None], ALIGNED)
    x, y = jnp.zeros((5, 2)), jnp.array([0, 1, 2, 1, 0])
    made, labels, _ = aligned_copy(jax.random.key(0), x, y, definition, 1.0)
    np.testing.assert_array_equal(made, np.repeat(ALIGNED[y][:, None], 2, 1))
    assert none(jax.random.key(0), x, y, definition, 1.0)[0] is x
    np.testing.assert_array_equal(labels, y)


def test_the_oracle_selects_what_is_aligned():
    x = {"attribute": jnp.array([2, 1, 1])}
    _, _, mask = select_aligned(jax.random.key(0), x, jnp.array([0, 1, 2]), DEFINITION, 1.0)
    np.testing.assert_array_equal(mask, [True, False, True])


def test_the_aligned_attribute_is_estimated_from_scores():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    scores = rng.random((200, 5))
    expected = [scores[labels == c].sum(0).argmax() for c in range(4)]
    np.testing.assert_array_equal(
        estimate_aligned_attr(jnp.asarray(scores), jnp.asarray(labels), 4), expected
    )


def test_the_amplified_share_is_that_of_a_draw():
    rng = np.random.default_rng(0)
    aligned = rng.random(100_000) < 0.6
    assert abs((aligned | (rng.random(100_000) < 0.3)).mean() - amplified_share(0.6, 0.3)) < 0.01
    assert amplified_share(0.9, 0.0) == pytest.approx(0.9)


def test_selection_is_by_strict_threshold_and_agreement():
    probabilities = jnp.array(
        [[0.995, 0.99, 0.999, 0.2], [0.995, 0.999, 0.999, 0.2], [0.995, 0.999, 0.5, 1.0]]
    )
    np.testing.assert_array_equal(select_by_agreement(probabilities), [True, False, False, False])
    np.testing.assert_array_equal(select_by_agreement(probabilities, agreement=2), [True, True, True, False])


def test_the_biased_network_learns_from_what_is_made_and_its_losses_are_of_the_batch():
    """One step by hand: plain cross entropy on the aligned copy, memory and difficulty of the real images."""
    definition = DEFINITION._replace(
        apply=lambda key, batch, attr: {**batch, "image": batch["image"].at[:, 0, 0, 0].set(attr)}
    )
    method = amplified_lff(
        NETWORK,
        optax.sgd(0.5),
        dataset=DATASET,
        num_classes=CLASSES,
        definition=definition,
        synthesizer="aligned_copy",
    )
    batch = BATCHES[0]
    before = jax.jit(method.init)(jax.random.key(0), batch)
    after, metrics = jax.jit(method.update)(before, batch, jax.random.key(1))
    copy = batch["image"].copy()
    copy[:, 0, 0, 0] = ALIGNED[batch["label"]]

    def cross_entropy(params, image):
        logits = NETWORK.apply({"params": params}, image, train=False)[0]["logits"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    params = before.biased_variables["params"]
    gradient = jax.grad(lambda p: cross_entropy(p, copy).mean())(params)
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)
    chex.assert_trees_all_close(after.biased_variables["params"], expected, atol=1e-6)
    np.testing.assert_allclose(metrics["biased_loss"], cross_entropy(params, copy).mean(), rtol=1e-5)
    np.testing.assert_allclose(
        after.biased_memory.value[batch["index"]], cross_entropy(params, batch["image"]), rtol=1e-5
    )


def test_an_appended_batch_is_learnt_from_beside_the_real_one():
    arguments = dict(
        dataset=DATASET, num_classes=CLASSES, definition=DEFINITION, synthesizer="select_aligned"
    )
    _state, (metrics,) = _run(
        amplified_lff(NETWORK, optax.sgd(0.1), placement="append", **arguments), steps=1
    )
    start = jax.jit(lff(NETWORK, optax.sgd(0.1), dataset=DATASET, num_classes=CLASSES).init)(
        jax.random.key(0), BATCHES[0]
    )
    logits = NETWORK.apply(start.biased_variables, BATCHES[0]["image"], train=False)[0]["logits"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, BATCHES[0]["label"])
    aligned = BATCHES[0]["attribute"] == ALIGNED[BATCHES[0]["label"]]
    expected = (losses.sum() + losses[aligned].sum()) / (len(losses) + aligned.sum())
    np.testing.assert_allclose(metrics["biased_loss"], expected, rtol=1e-5)


def test_a_biased_network_alone_learns_the_bias_and_not_the_content():
    method = amplified_erm(NETWORK, optax.adam(0.03), num_classes=CLASSES, definition=DEFINITION)
    init, update = jax.jit(method.init), jax.jit(method.update)
    state = init(jax.random.key(0), BATCHES[0])
    for i in range(300):
        state, _ = update(state, BATCHES[i % 6], jax.random.key(i))
    prediction = method.predict(state, DATASET)["logits"].argmax(-1)
    np.testing.assert_array_equal(ALIGNED[prediction], DATASET["attribute"])


def test_in_two_stages_the_biased_losses_are_those_of_the_frozen_network():
    variables = NETWORK.init(jax.random.key(5), DATASET["image"])
    method = two_stage_lff(
        NETWORK,
        _handed_over(NETWORK, variables),
        optax.adam(1e-2),
        dataset=DATASET,
        num_classes=CLASSES,
        batch_size=7,
        transforms=(standardize(scale=2.0),),
    )
    state, history = _run(method)
    logits = NETWORK.apply(variables, DATASET["image"] / 2, train=False)[0]["logits"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, DATASET["label"])
    np.testing.assert_allclose(state.biased_memory.value, losses, rtol=1e-5)
    chex.assert_trees_all_equal(state.biased_variables, variables)
    assert state.memory.seen.all()
    # The first step's weights, by hand: nothing is remembered of the debiased network but this batch.
    start = jax.jit(method.init)(jax.random.key(0), BATCHES[0])
    logits = NETWORK.apply(start.variables, BATCHES[0]["image"], train=False)[0]["logits"]
    fresh = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, BATCHES[0]["label"]))
    weights = []
    for index, label, loss in zip(BATCHES[0]["index"], BATCHES[0]["label"], fresh):
        b = losses[index] / losses[DATASET["label"] == label].max()
        d = loss / fresh[BATCHES[0]["label"] == label].max()
        weights.append(b / (b + d + 1e-8))
    np.testing.assert_allclose(history[0]["weight"], np.mean(weights), rtol=1e-5)
    np.testing.assert_allclose(history[0]["loss"], np.mean(weights * fresh), rtol=1e-5)


def test_members_of_a_biased_ensemble_are_trained_as_each_would_be_alone():
    alone = jax.jit(biased_ensemble(ensemble(NETWORK, size=1), optax.adam(0.01)).update)
    network = ensemble(NETWORK, size=3)
    method = biased_ensemble(network, optax.adam(0.01))
    state = jax.jit(method.init)(jax.random.key(0), BATCHES[0])
    member = jax.tree.map(lambda x: x[1:2] if x.ndim else x, state)
    update = jax.jit(method.update)
    for batch in BATCHES:
        state, _ = update(state, batch, jax.random.key(1))
        member, _ = alone(member, batch, jax.random.key(1))
    trained = jax.tree.map(lambda x: x[1:2], state.variables)
    chex.assert_trees_all_close(trained, member.variables, atol=1e-6)


def test_what_the_ensemble_is_sure_of_is_all_the_biased_network_learns_from():
    network = ensemble(NETWORK, size=5)
    variables = network.init(jax.random.key(2), DATASET["image"])
    method = bias_ensemble(
        NETWORK,
        _handed_over(network, variables),
        optax.sgd(0.5),
        dataset=DATASET,
        num_classes=CLASSES,
        threshold=0.4,
        agreement=2,
        batch_size=10,
    )
    before = jax.jit(method.init)(jax.random.key(0), BATCHES[0])
    logits = network.apply(variables, DATASET["image"], train=False)[0]["member_logits"]
    probability = jax.nn.softmax(logits)[np.arange(24), :, DATASET["label"]]
    np.testing.assert_array_equal(before.selected, (probability > 0.4).sum(1) >= 2)
    assert 0 < before.selected.sum() < 24
    after, metrics = jax.jit(method.update)(before, BATCHES[0], jax.random.key(1))
    selected = np.asarray(before.selected)[BATCHES[0]["index"]]

    def loss(params):
        logits = NETWORK.apply({"params": params}, BATCHES[0]["image"], train=False)[0]["logits"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, BATCHES[0]["label"])
        return (losses * selected).sum() / selected.sum()

    params = before.biased_variables["params"]
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(loss)(params))
    chex.assert_trees_all_close(after.biased_variables["params"], expected, atol=1e-6)
    np.testing.assert_allclose(metrics["selected"], selected.mean())


def test_the_bias_branch_of_the_disentangled_method_learns_from_what_the_ensemble_is_sure_of():
    encoder, network = mlp(num_classes=None, hidden=(4,)), ensemble(NETWORK, size=5)
    variables = network.init(jax.random.key(2), DATASET["image"])
    weights = dict(num_classes=CLASSES, swap_start=1, lambda_dis_align=2.0, lambda_swap_align=3.0)
    method = disentangled_bias_ensemble(
        encoder,
        _handed_over(network, variables),
        optax.adam(0.01),
        dataset=DATASET,
        threshold=0.4,
        agreement=2,
        **weights,
    )
    state = jax.jit(method.init)(jax.random.key(0), BATCHES[0])
    update = jax.jit(method.update)
    reference = DisentangledState(*state[:-1])
    reference_update = disentangled_update(
        encoder,
        optax.adam(0.01),
        labels_all=DATASET["label"],
        decay=0.7,
        lambda_swap=1.0,
        biased_loss=optax.softmax_cross_entropy_with_integer_labels,
        **weights,
    )
    logits = network.apply(variables, DATASET["image"], train=False)[0]["member_logits"]
    probability = jax.nn.softmax(logits)[np.arange(24), :, DATASET["label"]]
    expected = np.asarray((probability > 0.4).sum(1) >= 2)
    np.testing.assert_array_equal(state.selected, expected)
    for batch in BATCHES:
        state, metrics = update(state, batch, jax.random.key(1))
        selected = expected[batch["index"]]
        reference, _ = reference_update(reference, batch, jax.random.key(1), selected)
        np.testing.assert_allclose(metrics["selected"], selected.mean())
    chex.assert_trees_all_close(DisentangledState(*state[:-1]), reference, atol=1e-5)


def test_an_empty_selection_moves_nothing_and_is_finite():
    network = ensemble(NETWORK, size=5)
    method = bias_ensemble(NETWORK, network, optax.sgd(0.5), dataset=DATASET, num_classes=CLASSES)
    before = jax.jit(method.init)(jax.random.key(0), BATCHES[0])
    after, metrics = jax.jit(method.update)(before, BATCHES[0], jax.random.key(1))
    chex.assert_trees_all_equal(after.biased_variables, before.biased_variables)
    chex.assert_tree_all_finite((after, metrics))


def test_recolouring_gives_the_grey_image_the_colour_of_the_attribute():
    rng = np.random.default_rng(0)
    grey = {
        "image": rng.integers(0, 256, (20, 4, 4, 1), dtype=np.uint8),
        "label": np.arange(20, dtype=np.int32) % 10,
    }
    dataset = colored_digits(grey, aligned_ratio=0.5, std=0.0, keep_gray=True)
    definition = recoloring(std=0.0, transforms=(standardize(),))
    attr = np.arange(20) // 2
    made = jax.jit(definition.apply)(jax.random.key(0), dataset, attr)
    expected = np.trunc(grey["image"] * MEAN_COLOR[attr][:, None, None]) / 255
    np.testing.assert_allclose(made["image"], expected, atol=1.01 / 255)  # see colorize: off by one, rarely
    assert (np.abs(made["image"] - expected) > 1e-6).mean() < 0.01
    noisy = recoloring(std=0.05).apply(jax.random.key(0), dataset, attr)["image"]
    assert (noisy != recoloring(std=0.05).apply(jax.random.key(1), dataset, attr)["image"]).any()


def test_variants_are_looked_up():
    variants = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 2, 2, 1)
    batch = {"image": variants[:, 0], "variants": variants}
    definition = variant_lookup(aligned_attr=(0, 1, 2), num_attrs=3)
    made = definition.apply(jax.random.key(0), batch, jnp.array([2, 1]))
    np.testing.assert_array_equal(made["image"], variants[[0, 1], [2, 1]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"agreement": 6}, "^agreement: expected 1 to 5, .* got 6"), ({"threshold": 1.0}, "^threshold: ")],
)
def test_a_selection_that_cannot_be_made_is_refused(arguments, message):
    method = bias_ensemble(
        NETWORK, ensemble(NETWORK, size=5), optax.sgd(0.5), dataset=DATASET, num_classes=CLASSES, **arguments
    )
    with pytest.raises(UserError, match=message):
        jax.eval_shape(method.init, jax.random.key(0), BATCHES[0])


def test_a_frozen_network_of_another_size_is_refused():
    other = mlp(num_classes=CLASSES, hidden=(4,))
    method = two_stage_lff(NETWORK, other, optax.sgd(0.5), dataset=DATASET, num_classes=CLASSES)
    with pytest.raises(UserError, match="^biased_network: it must be of the kind and size"):
        jax.eval_shape(method.init, jax.random.key(0), BATCHES[0])


def test_batches_without_what_a_definition_needs_are_refused():
    with pytest.raises(UserError, match="no 'gray'; set keep_gray"):
        recoloring(std=0.1).apply(jax.random.key(0), BATCHES[0], BATCHES[0]["label"])
    with pytest.raises(UserError, match="no 'variants' of 10 attributes; set keep_variants"):
        variant_lookup().apply(jax.random.key(0), BATCHES[0], BATCHES[0]["label"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1.5}, "^p: expected a number in"),
        ({"synthesizer": "bias"}, "^synthesizer: no 'bias'"),
        ({"definition": recoloring(std=0.1)}, "^definition.aligned_attr: .* each of 3 classes, got 10"),
        ({"q": 0.0}, "^q: "),
        ({"decay": 1.0}, "^decay: "),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    arguments = {"dataset": DATASET, "num_classes": CLASSES, "definition": DEFINITION, **arguments}
    with pytest.raises(UserError, match=message):
        amplified_lff(NETWORK, optax.sgd(0.1), **arguments)


def test_attributes_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match=r"aligned_attr: expected colours 0\.\.9"):
        recoloring(std=0.1, aligned_attr=(10,))
    with pytest.raises(UserError, match=r"aligned_attr: expected attributes 0\.\.1"):
        variant_lookup(aligned_attr=(0, 2), num_attrs=2)
