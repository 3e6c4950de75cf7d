import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.core import UserError
from jaxlab.methods.debiasing.lff import (
    LossMemory,
    class_max,
    generalized_cross_entropy,
    init_loss_memory,
    lff,
    lff_losses,
    relative_difficulty,
    update_loss_memory,
)
from jaxlab.nn.mlp import mlp

LOSSES = jax.jit(jax.value_and_grad(lambda *args: sum(lff_losses(*args)[:2]), argnums=(0, 1, 3)))
UPDATE_MEMORY = jax.jit(update_loss_memory)
DIFFICULTY = jax.jit(relative_difficulty, static_argnums=5)


def _logits(rows: int, classes: int = 5, seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng(seed).normal(size=(rows, classes))).astype(np.float32)


def _labels(rows: int, classes: int = 5) -> np.ndarray:
    return np.random.default_rng(9).integers(0, classes, rows).astype(np.int32)


def _softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(np.float64(logits) - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -np.log(_softmax(logits)[np.arange(len(labels)), labels])


class OfficialMemory:
    """The official code's moving average, in float64, one example at a time."""

    def __init__(self, labels_all: np.ndarray, decay: float = 0.7):
        self.labels_all, self.decay = labels_all, decay
        self.value, self.updated = np.zeros(len(labels_all)), np.zeros(len(labels_all))

    def update(self, index: np.ndarray, loss: np.ndarray) -> None:
        old, updated = self.value.copy(), self.updated.copy()
        for i, l in zip(index, loss):
            self.value[i] = self.decay * old[i] + (1 - self.decay * updated[i]) * l
            self.updated[i] = 1

    def fraction(self, index: np.ndarray) -> np.ndarray:
        most = [self.value[self.labels_all == self.labels_all[i]].max() for i in index]
        return self.value[index] / most


@pytest.mark.parametrize("form", ["stop_gradient", "textbook"])
@pytest.mark.parametrize("q", [0.3, 1.0])
def test_generalized_cross_entropy_and_its_gradient_agree_with_their_formulas(form, q):
    logits, labels = _logits(11), _labels(11)
    p = _softmax(logits)
    p_y = p[np.arange(11), labels]
    value, factor = {
        "stop_gradient": (q * p_y**q * -np.log(p_y), q * p_y**q),
        "textbook": ((1 - p_y**q) / q, p_y**q),
    }[form]
    ours, pull_back = jax.vjp(jax.jit(lambda f: generalized_cross_entropy(f, labels, q, form)), logits)
    np.testing.assert_allclose(ours, value, rtol=1e-5, atol=1e-7)
    (gradient,) = pull_back(jnp.ones(11))
    np.testing.assert_allclose(gradient, factor[:, None] * (p - np.eye(5)[labels]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["stop_gradient", "textbook"])
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_generalized_cross_entropy_is_finite_for_large_logits(form, scale):
    logits, label = jnp.array([[scale, 0.0, 0.0]]), jnp.array([0])
    value, gradient = jax.jit(
        jax.value_and_grad(lambda f: generalized_cross_entropy(f, label, form=form)[0])
    )(logits)
    certain_and_wrong = 1 / 0.7 if form == "textbook" else 0
    np.testing.assert_allclose(value, 0 if scale > 0 else certain_and_wrong, rtol=1e-6)
    np.testing.assert_array_equal(gradient, 0)


def test_an_unknown_form_is_refused():
    with pytest.raises(UserError, match="^form: expected 'stop_gradient' or 'textbook'"):
        generalized_cross_entropy(_logits(2), _labels(2), form="text")


def test_the_first_loss_is_remembered_as_it_is_and_later_ones_move_the_average():
    memory = init_loss_memory(3)
    for loss in ([2.0, 4.0], [1.0, 0.0], [1.0, 0.0]):
        memory = UPDATE_MEMORY(memory, jnp.array([2, 0]), jnp.array(loss))
    np.testing.assert_allclose(memory.value, [4 * 0.7**2, 0, 2 * 0.49 + 0.21 + 0.3], rtol=1e-6)
    np.testing.assert_array_equal(memory.seen, [True, False, True])


def test_loss_memory_and_difficulty_agree_with_the_official_code_over_many_batches():
    rng = np.random.default_rng(0)
    labels_all = rng.integers(0, 3, 12)
    memories = [init_loss_memory(12), init_loss_memory(12)]
    official = [OfficialMemory(labels_all), OfficialMemory(labels_all)]
    for _ in range(9):
        index = rng.integers(0, 12, 5)  # with repetitions
        for k in range(2):
            loss = rng.exponential(size=5).astype(np.float32)
            memories[k] = UPDATE_MEMORY(memories[k], index, loss)
            official[k].update(index, loss)
            np.testing.assert_allclose(memories[k].value, official[k].value, rtol=1e-5)
            np.testing.assert_array_equal(memories[k].seen, official[k].updated > 0)
        b, d = (memory.fraction(index) for memory in official)
        weight = DIFFICULTY(*memories, index, labels_all[index], labels_all, 3)
        np.testing.assert_allclose(weight, b / (b + d + 1e-8), rtol=1e-5)


def test_the_last_of_a_repeated_example_counts():
    memory = LossMemory(jnp.array([1.0, 0.0]), jnp.array([True, False]))
    memory = UPDATE_MEMORY(memory, jnp.array([0, 1, 0, 1]), jnp.array([5.0, 6.0, 7.0, 8.0]))
    np.testing.assert_allclose(memory.value, [0.7 + 0.3 * 7, 8.0], rtol=1e-6)


@pytest.mark.parametrize("outside", [-1, 4, 2**31 - 1])
def test_an_index_outside_the_memory_is_dropped(outside):
    memory = LossMemory(jnp.arange(4.0), jnp.array([False, True, True, True]))
    updated = UPDATE_MEMORY(memory, jnp.array([outside, 1, outside]), jnp.array([9.0, 2.0, jnp.nan]))
    np.testing.assert_allclose(updated.value, [0, 0.7 + 0.6, 2, 3], rtol=1e-6)
    np.testing.assert_array_equal(updated.seen, memory.seen)


def test_class_maximum_is_over_the_whole_set_and_zero_for_an_empty_class():
    value, labels = jnp.array([0.5, 3.0, 0.0, 2.0]), jnp.array([0, 3, 1, 0])
    maximum = jax.jit(class_max, static_argnums=2)(value, labels, 5)
    np.testing.assert_array_equal(maximum, [2, 0, 0, 3, 0])


@pytest.mark.parametrize("max_eps", [0.0, 1e-8])
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-30, 1.0, 1e30])
def test_relative_difficulty_is_within_zero_and_one_at_any_scale(scale, max_eps):
    rng = np.random.default_rng(1)
    labels_all, index = rng.integers(0, 3, 20), np.arange(21)  # the last is outside
    memories = [
        LossMemory(jnp.asarray(scale * rng.uniform(size=20), jnp.float32), np.ones(20, bool))
        for _ in range(2)
    ]
    labels = np.append(labels_all, 0)
    weight = DIFFICULTY(*memories, index, labels, labels_all, 3, max_eps=max_eps)
    assert np.all((weight >= 0) & (weight <= 1))
    assert weight[-1] == 0
    if scale in (0.0, 1.0):
        assert np.any(weight > 0) == (scale > 0)


def test_what_the_debiased_network_has_memorised_and_the_biased_one_fails_on_has_full_weight():
    labels, seen = np.array([0, 1, 0]), np.ones(3, bool)
    failing, memorised = LossMemory(jnp.array([2.0, 3.0, 0.0]), seen), LossMemory(jnp.zeros(3), seen)
    weight = DIFFICULTY(failing, memorised, np.arange(3), labels, labels, 3)
    np.testing.assert_allclose(weight, [1, 1, 0], rtol=1e-6)
    np.testing.assert_array_equal(DIFFICULTY(memorised, failing, np.arange(3), labels, labels, 3), 0)


def test_no_gradient_flows_into_the_memory_or_through_the_difficulty():
    index, labels = jnp.array([0, 2]), jnp.array([1, 0])

    def difficulty(loss):
        memory = LossMemory(0.1 * loss[0] + jnp.ones(3), jnp.ones(3, bool))
        remembered = update_loss_memory(memory, index, loss)
        other = LossMemory(jnp.array([1.0, 2.0, 3.0]), jnp.ones(3, bool))
        return relative_difficulty(remembered, other, index, labels, jnp.array([1, 1, 0]), 2).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(difficulty))(jnp.array([0.3, 0.4])), 0)
    fresh = init_loss_memory(3)
    into = jax.jit(jax.grad(lambda loss: update_loss_memory(fresh, index, loss).value.sum()))
    np.testing.assert_array_equal(into(jnp.array([0.3, 0.4])), 0)


def test_losses_and_their_gradients_are_the_plain_means_with_the_weight_held_constant():
    logits_b, logits_d, labels = _logits(6), _logits(6, seed=1), _labels(6)
    weight = np.random.default_rng(2).uniform(size=6).astype(np.float32)
    value, (gradient_b, gradient_d, gradient_w) = LOSSES(logits_b, logits_d, labels, weight)
    loss_b, loss_d, per_example = lff_losses(logits_b, logits_d, labels, weight)

    p_b, p_d, target = _softmax(logits_b), _softmax(logits_d), np.eye(5)[labels]
    strength = 0.7 * p_b[np.arange(6), labels] ** 0.7
    np.testing.assert_allclose(loss_b, np.mean(strength * _cross_entropy(logits_b, labels)), rtol=1e-5)
    np.testing.assert_allclose(loss_d, np.mean(weight * _cross_entropy(logits_d, labels)), rtol=1e-5)
    np.testing.assert_allclose(value, loss_b + loss_d, rtol=1e-6)
    np.testing.assert_allclose(gradient_b, strength[:, None] * (p_b - target) / 6, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient_d, weight[:, None] * (p_d - target) / 6, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(gradient_w, 0)
    np.testing.assert_allclose(per_example["biased_loss"].mean(), loss_b, rtol=1e-6)
    np.testing.assert_allclose(per_example["debiased_loss"].mean(), loss_d, rtol=1e-6)


def test_masked_rows_change_neither_value_nor_gradient():
    logits_b, logits_d, labels = _logits(8), _logits(8, seed=1), _labels(8)
    weight, mask = np.linspace(0, 1, 8, dtype=np.float32), np.arange(8) < 5
    short, short_gradients = LOSSES(logits_b[:5], logits_d[:5], labels[:5], weight[:5])
    padded, padded_gradients = LOSSES(logits_b, logits_d, labels, weight, mask)
    chex.assert_trees_all_close(padded, short, rtol=1e-6)
    for ours, expected in zip(padded_gradients, short_gradients):
        np.testing.assert_allclose(ours[:5], expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(ours[5:], 0)
    nothing, gradients = LOSSES(logits_b, logits_d, labels, weight, np.zeros(8, bool))
    assert nothing == 0
    chex.assert_tree_all_finite(gradients)


def _problem(size: int = 24) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """A data set, and six batches that visit its examples more than once."""
    rng = np.random.default_rng(3)
    dataset = {
        "image": rng.normal(size=(size, 2, 2, 1)).astype(np.float32),
        "label": rng.integers(0, 3, size).astype(np.int32),
    }
    order = np.concatenate([rng.permutation(size) for _ in range(2)])
    batches = [
        {name: column[index] for name, column in dataset.items()} | {"index": index.astype(np.int32)}
        for index in np.split(order, 6)
    ]
    return dataset, batches


DATASET, BATCHES = _problem()
LAYERS = ("dense1", "head")
NETWORK = mlp(num_classes=3, hidden=(8,))
METHOD = lff(NETWORK, optax.adam(1e-2), dataset=DATASET, num_classes=3)
INIT, UPDATE = jax.jit(METHOD.init), jax.jit(METHOD.update)


def _torch_network(torch, params):
    linears = [torch.nn.Linear(*params[name]["kernel"].shape) for name in LAYERS]
    with torch.no_grad():
        for linear, name in zip(linears, LAYERS):
            linear.weight.copy_(torch.tensor(np.asarray(params[name]["kernel"]).T))
            linear.bias.copy_(torch.tensor(np.asarray(params[name]["bias"])))
    return torch.nn.Sequential(torch.nn.Flatten(), linears[0], torch.nn.ReLU(), linears[1])


@pytest.mark.parametrize("biased_loss", ["generalized_cross_entropy", "cross_entropy"])
def test_updates_agree_with_the_official_step_in_torch(biased_loss):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    update = UPDATE
    if biased_loss == "cross_entropy":
        method = lff(NETWORK, optax.adam(1e-2), dataset=DATASET, num_classes=3, biased_loss=biased_loss)
        update = jax.jit(method.update)
    state = INIT(jax.random.key(0), BATCHES[0])
    nets = [_torch_network(torch, v["params"]) for v in (state.biased_variables, state.variables)]
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-2) for net in nets]
    memories = [OfficialMemory(DATASET["label"]) for _ in nets]

    for batch in BATCHES:
        image, label = torch.tensor(batch["image"]), torch.tensor(batch["label"]).long()
        logit_b, logit_d = (net(image) for net in nets)
        for logit, memory in zip((logit_b, logit_d), memories):
            loss = functional.cross_entropy(logit, label, reduction="none").detach()
            memory.update(batch["index"], loss.numpy())
        b, d = (memory.fraction(batch["index"]) for memory in memories)
        loss_weight = torch.tensor(b / (b + d + 1e-8))
        loss_b = functional.cross_entropy(logit_b, label, reduction="none")
        if biased_loss == "generalized_cross_entropy":
            p = functional.softmax(logit_b, dim=1)
            yg = torch.gather(p, 1, label[:, None])
            loss_b = loss_b * (yg.squeeze().detach() ** 0.7) * 0.7
        loss_d = functional.cross_entropy(logit_d, label, reduction="none") * loss_weight
        loss = loss_b.mean() + loss_d.mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

        state, metrics = update(state, batch, jax.random.key(1))
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
        np.testing.assert_allclose(metrics["biased_loss"], loss_b.mean().item(), rtol=1e-5)
        np.testing.assert_allclose(metrics["debiased_loss"], loss_d.mean().item(), rtol=1e-5)
        np.testing.assert_allclose(metrics["weight"], loss_weight.mean(), rtol=1e-5)
        for name, logit in (("biased_accuracy", logit_b), ("accuracy", logit_d)):
            np.testing.assert_allclose(metrics[name], (logit.argmax(1) == label).double().mean(), rtol=1e-6)
        for ours, memory in zip((state.biased_memory, state.memory), memories):
            np.testing.assert_allclose(ours.value, memory.value, rtol=1e-4, atol=1e-6)
        for variables, net in zip((state.biased_variables, state.variables), nets):
            for name, linear in zip(LAYERS, (net[1], net[3])):
                ours = variables["params"][name]
                np.testing.assert_allclose(ours["kernel"], linear.weight.detach().T, atol=1e-5)
                np.testing.assert_allclose(ours["bias"], linear.bias.detach(), atol=1e-5)


def test_both_networks_start_apart_and_the_debiased_one_predicts():
    state = INIT(jax.random.key(0), BATCHES[0])
    kernels = [v["params"]["head"]["kernel"] for v in (state.variables, state.biased_variables)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1
    expected = NETWORK.apply(state.variables, BATCHES[0]["image"], train=False)[0]["logits"]
    np.testing.assert_array_equal(METHOD.predict(state, BATCHES[0])["logits"], expected)
    biased = METHOD.predict(state._replace(variables=state.biased_variables), BATCHES[0])
    assert np.abs(biased["logits"] - expected).max() > 0.01


def test_seeds_trained_as_one_program_are_those_trained_alone():
    keys = jax.random.split(jax.random.key(0), 3)
    alone = [INIT(key, BATCHES[0]) for key in keys]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    update_together = jax.jit(jax.vmap(METHOD.update, in_axes=(0, None, 0)))
    for batch in BATCHES[:3]:
        together, metrics = update_together(together, batch, keys)
        alone, metrics_alone = zip(*[UPDATE(state, batch, key) for state, key in zip(alone, keys)])
    assert all(value.shape == (3,) and np.isfinite(value).all() for value in metrics.values())
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(alone, metrics_alone))
    chex.assert_trees_all_close((together, metrics), expected, atol=1e-5)


def test_a_memorised_batch_has_finite_metrics_and_no_weight():
    state = INIT(jax.random.key(0), BATCHES[0])
    label = np.int32(1)
    params = jax.tree.map(jnp.zeros_like, state.variables["params"])
    params["head"]["bias"] = 1e4 * jax.nn.one_hot(label, 3)
    state = state._replace(variables={"params": params}, biased_variables={"params": params})
    batch = {**BATCHES[0], "label": np.full_like(BATCHES[0]["label"], label)}
    state, metrics = UPDATE(state, batch, jax.random.key(1))
    assert metrics["accuracy"] == metrics["biased_accuracy"] == 1
    assert metrics["weight"] == 0
    chex.assert_tree_all_finite((state, metrics))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": 0.0}, "^q: expected a number in"),
        ({"q": 1.5}, "^q: expected a number in"),
        ({"decay": 1.0}, "^decay: expected a number in"),
        ({"num_classes": 2}, "^num_classes: 2, but the labels of the data set are 0..2"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    arguments = {"dataset": DATASET, "num_classes": 3, **arguments}
    with pytest.raises(UserError, match=message):
        lff(NETWORK, optax.sgd(0.1), **arguments)


def test_batches_without_index_are_refused():
    with pytest.raises(UserError, match="no 'index'"):
        METHOD.init(jax.random.key(0), {"image": BATCHES[0]["image"], "label": BATCHES[0]["label"]})


@pytest.mark.parametrize("seen_before", [0, 3])
def test_difficulty_of_the_batch_is_the_papers_formula_whatever_is_remembered(seen_before):
    method = lff(NETWORK, optax.sgd(0.5), dataset=DATASET, num_classes=3, difficulty="batch")
    update = jax.jit(method.update)
    state = jax.jit(method.init)(jax.random.key(0), BATCHES[0])
    for batch in BATCHES[:seen_before]:
        state, _ = update(state, batch, jax.random.key(1))
    batch = BATCHES[seen_before]

    def losses(params):
        logits = NETWORK.apply({"params": params}, batch["image"], train=True)[0]["logits"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], 1)[:, 0]

    params = state.variables["params"]
    ce_b, ce_d = losses(state.biased_variables["params"]), losses(params)
    weight = ce_b / (ce_b + ce_d)
    gradient = jax.grad(lambda p: jnp.mean(weight * losses(p)))(params)
    updated, metrics = update(state, batch, jax.random.key(1))
    np.testing.assert_allclose(metrics["weight"], weight.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["debiased_loss"], (weight * ce_d).mean(), rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)
    chex.assert_trees_all_close(updated.variables["params"], expected, atol=1e-6)
    # The memories go on all the same: `debiasing.difficulty` reads them.
    remembered = UPDATE_MEMORY(state.memory, batch["index"], ce_d)
    chex.assert_trees_all_close(updated.memory, remembered, rtol=1e-5)
