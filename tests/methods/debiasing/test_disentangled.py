import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.core import Network, UserError
from jaxlab.core.resolve import build
from jaxlab.methods.debiasing.disentangled import (
    combine_losses,
    delayed_step_decay,
    disentangle_losses,
    disentangled,
    disentangled_logits,
    disentangled_update,
    recombined_loss,
    swap_bias_features,
    swap_schedule,
)
from jaxlab.methods.debiasing.lff import generalized_cross_entropy
from jaxlab.metrics.classification import negative_log_likelihood

TERMS = ("dis_conflict", "dis_align", "swap_conflict", "swap_align")
SIZE, DIM, FEATURES, CLASSES = 12, 5, 4, 3
LAMBDAS = {"lambda_dis_align": 2.0, "lambda_swap_align": 5.0, "lambda_swap": 0.5}
RNG = np.random.default_rng(0)
# A plain model for the pure functions: two linear encoders, two linear heads with bias.
PARAMS = {
    "encoder_l": RNG.normal(size=(DIM, FEATURES)).astype(np.float32),
    "encoder_b": RNG.normal(size=(DIM, FEATURES)).astype(np.float32),
    "head_l": RNG.normal(size=(2 * FEATURES + 1, CLASSES)).astype(np.float32),
    "head_b": RNG.normal(size=(2 * FEATURES + 1, CLASSES)).astype(np.float32),
}
X = RNG.normal(size=(SIZE, DIM)).astype(np.float32)
Y = RNG.integers(0, CLASSES, SIZE).astype(np.int32)
W = RNG.uniform(0.1, 1, SIZE).astype(np.float32)
PERM = RNG.permutation(SIZE)
PERM[[0, np.argmax(PERM == 0)]] = 0, PERM[0]  # example 0 keeps its own bias features


def _head(matrix, z):
    return z @ matrix[:-1] + matrix[-1]


def _losses(params, weight=W, perm=PERM, **options):
    z_l, z_b = X @ params["encoder_l"], X @ params["encoder_b"]
    heads = [functools.partial(_head, params[name]) for name in ("head_l", "head_b")]
    return disentangle_losses(*heads, z_l, z_b, Y, weight, perm, **options)


def _recombined(params):
    z_l, z_b = X @ params["encoder_l"], X @ params["encoder_b"]
    return recombined_loss(functools.partial(_head, params["head_b"]), z_l, z_b, Y, PERM)


def _official(torch, head_l, head_b, z_l, z_b, label, loss_weight, indices, gce=True):
    """The four losses of each example as the official code computes them, and the un-swapped logits."""
    cross_entropy = functools.partial(torch.nn.functional.cross_entropy, reduction="none")

    def bias_criterion(logits, targets):
        if not gce:
            return cross_entropy(logits, targets)
        p = torch.nn.functional.softmax(logits, dim=1)
        yg = torch.gather(p, 1, targets[:, None])
        return cross_entropy(logits, targets) * (yg.squeeze(1).detach() ** 0.7) * 0.7

    pred_conflict = head_l(torch.cat((z_l, z_b.detach()), dim=1))
    pred_align = head_b(torch.cat((z_l.detach(), z_b), dim=1))
    if callable(loss_weight):
        loss_weight = loss_weight(pred_conflict, pred_align)
    z_b_swap, label_swap = z_b[indices], label[indices]
    pred_mix_conflict = head_l(torch.cat((z_l, z_b_swap.detach()), dim=1))
    pred_mix_align = head_b(torch.cat((z_l.detach(), z_b_swap), dim=1))
    pred_recombined = head_b(torch.cat((z_l.detach()[indices], z_b), dim=1))  # ours
    losses = {
        "dis_conflict": cross_entropy(pred_conflict, label) * loss_weight,
        "dis_align": bias_criterion(pred_align, label),
        "swap_conflict": cross_entropy(pred_mix_conflict, label) * loss_weight,
        "swap_align": bias_criterion(pred_mix_align, label_swap),
        "recombined": cross_entropy(pred_recombined, label),
    }
    return losses, pred_conflict, pred_align


def test_losses_and_all_their_gradients_agree_with_the_official_code_in_torch():
    torch = pytest.importorskip("torch")
    tensors = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in PARAMS.items()}
    z_l, z_b = (torch.tensor(X).double() @ tensors[name] for name in ("encoder_l", "encoder_b"))
    heads = [functools.partial(_head, tensors[name]) for name in ("head_l", "head_b")]
    label, weight = torch.tensor(Y).long(), torch.tensor(W).double()
    expected, _, _ = _official(torch, *heads, z_l, z_b, label, weight, PERM)

    def losses(params):
        return _losses(params) | {"recombined": _recombined(params)}

    ours, jacobian = jax.jit(lambda params: (losses(params), jax.jacrev(losses)(params)))(PARAMS)
    assert set(ours) == set(expected)
    for term, values in expected.items():
        np.testing.assert_allclose(ours[term], values.detach(), rtol=1e-4, atol=1e-6)
        for row in range(SIZE):
            gradients = torch.autograd.grad(
                values[row], list(tensors.values()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(tensors, gradients):
                gradient = np.zeros_like(PARAMS[name]) if gradient is None else gradient
                np.testing.assert_allclose(jacobian[term][name][row], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("term", [*TERMS, "recombined"])
def test_each_term_trains_its_own_branch_only_and_all_columns_of_its_head(term):
    def loss(params):
        return (_recombined(params) if term == "recombined" else _losses(params)[term]).mean()

    gradient = jax.jit(jax.grad(loss))(PARAMS)
    own, other = ("l", "b") if term.endswith("conflict") else ("b", "l")
    for part in ("encoder", "head"):
        assert np.all(gradient[f"{part}_{own}"] != 0)
        np.testing.assert_array_equal(gradient[f"{part}_{other}"], 0)


def test_no_gradient_flows_through_the_weight():
    gradient = jax.grad(lambda weight: sum(v.sum() for v in _losses(PARAMS, weight).values()))(W)
    np.testing.assert_array_equal(gradient, 0)


def test_logits_are_of_the_intrinsic_features_first_for_both_heads():
    z_l, z_b = jnp.ones((2, 3)), jnp.zeros((2, 3))
    for features in disentangled_logits(lambda z: z, lambda z: z, z_l, z_b):
        np.testing.assert_array_equal(features, [[1, 1, 1, 0, 0, 0]] * 2)


def test_swapping_gives_each_row_the_bias_features_and_the_label_of_its_partner():
    z_b, labels = jnp.arange(8.0).reshape(4, 2), jnp.array([7, 8, 9, 10])
    swapped, labels_swapped = jax.jit(swap_bias_features)(z_b, labels, jnp.array([2, 1, 3, 0]))
    np.testing.assert_array_equal(swapped, [[4, 5], [2, 3], [6, 7], [0, 1]])
    np.testing.assert_array_equal(labels_swapped, [9, 8, 10, 7])


def test_the_weight_stays_with_the_intrinsic_features_and_the_swapped_label_is_the_bias_heads():
    z_l, z_b = X @ PARAMS["encoder_l"], X @ PARAMS["encoder_b"]
    losses = jax.jit(_losses)(PARAMS)
    for i, partner in enumerate(PERM):
        pair = np.concatenate([z_l[i], z_b[partner]])
        log_l, log_b = (jax.nn.log_softmax(_head(PARAMS[name], pair)) for name in ("head_l", "head_b"))
        np.testing.assert_allclose(losses["swap_conflict"][i], -W[i] * log_l[Y[i]], rtol=1e-4, atol=1e-6)
        log_p = log_b[Y[partner]]
        np.testing.assert_allclose(
            losses["swap_align"][i], 0.7 * np.exp(0.7 * log_p) * -log_p, rtol=1e-4, atol=1e-6
        )


def test_an_example_that_keeps_its_own_bias_features_has_its_own_losses():
    kept = np.arange(SIZE) == PERM
    assert kept[0]
    assert not kept.all()
    losses = _losses(PARAMS)
    for kind in ("conflict", "align"):
        same = np.isclose(losses[f"dis_{kind}"], losses[f"swap_{kind}"], rtol=1e-6)
        np.testing.assert_array_equal(same, kept)


def test_a_biased_loss_takes_the_place_of_the_generalized_cross_entropy_and_of_q():
    half = _losses(PARAMS, q=0.5)
    given = _losses(PARAMS, biased_loss=functools.partial(generalized_cross_entropy, q=0.5))
    chex.assert_trees_all_equal(half, given)
    assert np.abs(half["dis_align"] - _losses(PARAMS)["dis_align"]).max() > 0.01


@pytest.mark.parametrize(("swap_on", "expected"), [(False, 21.0), (True, 21 + 0.5 * 503)])
def test_combined_loss_is_the_weighted_sum_of_means_and_swapped_ones_count_when_on(swap_on, expected):
    losses = {
        "dis_conflict": jnp.array([0.0, 2.0]),
        "dis_align": jnp.array([4.0, 16.0]),
        "swap_conflict": jnp.array([3.0, 3.0]),
        "swap_align": jnp.array([200.0, 0.0]),
    }
    combined = jax.jit(combine_losses)(losses, *LAMBDAS.values(), swap_on)
    np.testing.assert_allclose(combined, expected, rtol=1e-6)


def test_masked_rows_change_neither_value_nor_gradient_and_a_mean_over_none_is_zero():
    rows = np.arange(SIZE) < 8

    def combined(losses, mask):
        return combine_losses(losses, 2.0, 5.0, 0.5, True, mask)

    losses = jax.jit(_losses)(PARAMS)
    mask = {"dis_align": rows, "swap_align": rows[PERM]}
    value, gradient = jax.jit(jax.value_and_grad(combined))(losses, mask)
    kept = {term: losses[term][mask.get(term, slice(None))] for term in TERMS}
    np.testing.assert_allclose(value, combined(kept, None), rtol=1e-6)
    for term in TERMS:
        np.testing.assert_array_equal(gradient[term] != 0, mask.get(term, np.ones(SIZE, bool)))
    nothing = jax.value_and_grad(combined)(losses, dict.fromkeys(TERMS, np.zeros(SIZE, bool)))
    chex.assert_trees_all_equal(nothing, jax.tree.map(jnp.zeros_like, nothing))


def test_the_first_step_that_swaps_is_the_one_after_the_start():
    steps = jnp.arange(6)
    np.testing.assert_array_equal(swap_schedule(steps, 3), [False] * 4 + [True] * 2)
    assert swap_schedule(4, 3) is True
    assert swap_schedule(3, 3) is False


@pytest.mark.parametrize(("start", "interval"), [(3, 4), (0, 1), (600, 600), (10_000, 10_000)])
def test_the_learning_rate_falls_at_the_end_of_each_interval_since_the_start(start, interval):
    schedule = jax.jit(delayed_step_decay(1e-2, start, interval, 0.5))
    for whole in range(1, 4):
        end = start + whole * interval
        np.testing.assert_allclose(schedule(end - 1), 1e-2 * 0.5 ** (whole - 1), rtol=1e-6)
        np.testing.assert_allclose(schedule(end), 1e-2 * 0.5**whole, rtol=1e-6)
    np.testing.assert_allclose(schedule(0), 1e-2, rtol=1e-6)


def test_a_config_puts_the_schedule_inside_an_optimizer():
    name = "jaxlab.methods.debiasing.disentangled:delayed_step_decay"
    schedule = dict(name=name, base_lr=1e-2, start=1, interval=2, gamma=0.1)
    optimizer = build("optimizer", dict(name="sgd", learning_rate=schedule))
    state, rates = optimizer.init(jnp.zeros(())), []
    for _ in range(6):
        move, state = optimizer.update(jnp.ones(()), state)
        rates.append(-move)
    np.testing.assert_allclose(rates, [1e-2, 1e-2, 1e-2, 1e-3, 1e-3, 1e-4], rtol=1e-5)


def _encoder(applied=None):
    """[B, DIM] -> relu features [B, FEATURES]; keeps the number of its training passes, as statistics."""

    def init(key, images):
        kernel_key, bias_key = jax.random.split(key)
        params = {
            "kernel": jax.random.normal(kernel_key, (images.shape[-1], FEATURES)),
            "bias": jax.random.normal(bias_key, (FEATURES,)),
        }
        return {"params": params, "batch_stats": {"passes": jnp.zeros(())}}

    def apply(variables, images, *, train, key=None):
        if applied is not None:
            applied.append((train, key is not None))
        params, passes = variables["params"], variables["batch_stats"]["passes"]
        features = jax.nn.relu(images @ params["kernel"] + params["bias"])
        return {"features": features}, {**variables, "batch_stats": {"passes": passes + train}}

    return Network(init, apply)


def _problem() -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """A data set of 24, and six batches of 12 that visit its examples three times."""
    rng = np.random.default_rng(3)
    dataset = {
        "image": rng.normal(size=(2 * SIZE, DIM)).astype(np.float32),
        "label": rng.integers(0, CLASSES, 2 * SIZE).astype(np.int32),
    }
    order = np.concatenate([rng.permutation(2 * SIZE) for _ in range(3)])
    batches = [
        {name: column[index] for name, column in dataset.items()} | {"index": index.astype(np.int32)}
        for index in np.split(order, 6)
    ]
    return dataset, batches


DATASET, BATCHES = _problem()
SWAP_START = 2
OPTIMIZER = optax.adam(delayed_step_decay(1e-2, SWAP_START, 2, 0.5))
OPTIONS = {"num_classes": CLASSES, "swap_start": SWAP_START, **LAMBDAS}
METHOD = disentangled(_encoder(), OPTIMIZER, dataset=DATASET, **OPTIONS)
INIT, UPDATE = jax.jit(METHOD.init), jax.jit(METHOD.update)


class OfficialMemory:
    """The official code's moving average, in float64."""

    def __init__(self, label):
        self.label, self.parameter = label, np.zeros(len(label))
        self.updated = np.zeros(len(label))

    def update(self, data, index):
        self.parameter[index] = (
            0.7 * self.parameter[index] + (1 - 0.7 * self.updated[index]) * data.detach().numpy()
        )
        self.updated[index] = 1

    def normalized(self, index):
        most = [self.parameter[self.label == label].max() for label in self.label[index]]
        return self.parameter[index] / most


@pytest.mark.parametrize("variant", ["gce", "cross_entropy", "recombine"])
def test_updates_agree_with_the_official_step_in_torch(variant):
    """Before, at and after the first swap; "cross_entropy" is that of selected examples only."""
    torch = pytest.importorskip("torch")
    update, selections = UPDATE, [None] * len(BATCHES)
    if variant != "gce":
        biased_loss = negative_log_likelihood if variant == "cross_entropy" else generalized_cross_entropy
        update = jax.jit(
            disentangled_update(
                _encoder(),
                OPTIMIZER,
                labels_all=DATASET["label"],
                decay=0.7,
                biased_loss=biased_loss,
                recombine=variant == "recombine",
                **OPTIONS,
            )
        )
    if variant == "cross_entropy":
        selections = [(np.arange(SIZE) + step) % 3 > 0 for step in range(len(BATCHES))]
        selections[-1][:] = False
    state = INIT(jax.random.key(0), BATCHES[0])

    branches = {}
    for name, variables in state.variables.items():
        layers = {}
        for layer, params in variables["params"].items():
            layers[layer] = torch.nn.Linear(*params["kernel"].shape).double()
            with torch.no_grad():
                layers[layer].weight.copy_(torch.tensor(np.asarray(params["kernel"]).T))
                layers[layer].bias.copy_(torch.tensor(np.asarray(params["bias"])))
        branches[name] = torch.nn.ModuleDict(layers)
    model_l, model_b = branches["intrinsic"], branches["bias"]
    optimizers = {name: torch.optim.Adam(branch.parameters(), lr=1e-2) for name, branch in branches.items()}
    memory_d, memory_b = OfficialMemory(DATASET["label"]), OfficialMemory(DATASET["label"])

    for step, (batch, selected) in enumerate(zip(BATCHES, selections)):
        key = jax.random.fold_in(jax.random.key(1), step)
        indices = np.array(jax.random.permutation(jax.random.split(key, 3)[2], SIZE))
        image, label = torch.tensor(batch["image"]).double(), torch.tensor(batch["label"]).long()
        index = batch["index"]

        def loss_weight(pred_conflict, pred_align, label=label, index=index):
            for memory, pred in ((memory_d, pred_conflict), (memory_b, pred_align)):
                memory.update(torch.nn.functional.cross_entropy(pred, label, reduction="none"), index)
            d, b = memory_d.normalized(index), memory_b.normalized(index)
            return torch.tensor(b / (b + d + 1e-8))

        z_l, z_b = (torch.relu(model["encoder"](image)) for model in (model_l, model_b))
        losses, pred_conflict, pred_align = _official(
            torch,
            model_l["head"],
            model_b["head"],
            z_l,
            z_b,
            label,
            loss_weight,
            indices,
            variant != "cross_entropy",
        )
        recombined = losses.pop("recombined")
        if variant == "recombine":
            losses["dis_align"] = recombined
        if selected is not None:
            for term, mask in (("dis_align", selected), ("swap_align", selected[indices])):
                losses[term] = losses[term][torch.tensor(mask)].sum() / max(1, mask.sum())
        losses = {term: value.mean() for term, value in losses.items()}
        loss = losses["dis_conflict"] + 2 * losses["dis_align"]
        if step > SWAP_START:
            loss = loss + 0.5 * (losses["swap_conflict"] + 5 * losses["swap_align"])
        for optimizer in optimizers.values():
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = 1e-2 * 0.5 ** (max(0, step - SWAP_START) // 2)
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()

        state, metrics = update(state, batch, key, *([] if selected is None else [selected]))
        assert set(metrics) == {"loss", *TERMS, "accuracy", "biased_accuracy", "weight"}
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
        for term in TERMS:
            np.testing.assert_allclose(metrics[term], losses[term].item(), rtol=1e-5, atol=1e-7)
        for metric, pred in (("accuracy", pred_conflict), ("biased_accuracy", pred_align)):
            np.testing.assert_allclose(metrics[metric], (pred.argmax(1) == label).double().mean(), rtol=1e-6)
        for ours, memory in ((state.memory, memory_d), (state.biased_memory, memory_b)):
            np.testing.assert_allclose(ours.value, memory.parameter, rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(ours.seen, memory.updated > 0)
        for name, opt_state in (("intrinsic", state.opt_state), ("bias", state.biased_opt_state)):
            for layer, linear in branches[name].items():
                # Adam's first moments are the gradients of all steps so far.
                for ours, of_tensor, tolerance in (
                    (state.variables[name]["params"], lambda tensor: tensor.detach(), 2e-5),
                    (opt_state[0].mu, lambda tensor: optimizers[name].state[tensor]["exp_avg"], 2e-6),  # noqa: B023
                ):
                    np.testing.assert_allclose(
                        ours[layer]["kernel"], of_tensor(linear.weight).T, rtol=1e-4, atol=tolerance
                    )
                    np.testing.assert_allclose(
                        ours[layer]["bias"], of_tensor(linear.bias), rtol=1e-4, atol=tolerance
                    )
    assert state.step == len(BATCHES)


def test_a_step_passes_through_each_encoder_once_and_keeps_the_statistics_of_both():
    applied = []
    method = disentangled(_encoder(applied), OPTIMIZER, dataset=DATASET, **OPTIONS)
    state = method.init(jax.random.key(0), BATCHES[0])
    applied.clear()
    update = jax.jit(method.update)
    for step in range(SWAP_START + 3):
        state, _ = update(state, BATCHES[step], jax.random.key(step))
    assert applied == [(True, True)] * 2  # traced once, the switch included
    assert update._cache_size() == 1
    for variables in state.variables.values():
        assert variables["batch_stats"]["passes"] == SWAP_START + 3
    applied.clear()
    method.predict(state, BATCHES[0])
    assert applied == [(False, False)] * 2


def test_either_head_predicts_from_an_examples_own_features_of_both_encoders():
    state = INIT(jax.random.key(0), BATCHES[0])
    images = BATCHES[0]["image"]
    z = []
    for name in ("intrinsic", "bias"):
        params = state.variables[name]["params"]["encoder"]
        z.append(np.maximum(images @ params["kernel"] + params["bias"], 0))
    features = np.concatenate(z, -1)
    for name in ("intrinsic", "bias"):
        method = disentangled(_encoder(), OPTIMIZER, dataset=DATASET, head=name, **OPTIONS)
        outputs = method.predict(state, {"image": images})
        params = state.variables[name]["params"]["head"]
        np.testing.assert_allclose(outputs["features"], features, rtol=1e-5, atol=1e-6)
        expected = features @ params["kernel"] + params["bias"]
        np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-4, atol=1e-5)


def test_predictions_have_the_gradient_of_the_whole_network():
    state = INIT(jax.random.key(0), BATCHES[0])

    def total(variables):
        return METHOD.predict(state._replace(variables=variables), BATCHES[0])["logits"].sum()

    gradient = jax.grad(total)(state.variables)
    for name in ("intrinsic", "bias"):
        assert np.abs(gradient[name]["params"]["encoder"]["kernel"]).max() > 0


def test_branches_start_apart_and_heads_as_pytorchs_linear():
    state = INIT(jax.random.key(0), BATCHES[0])
    intrinsic, bias = (state.variables[name]["params"] for name in ("intrinsic", "bias"))
    for a, b in zip(jax.tree.leaves(intrinsic), jax.tree.leaves(bias)):
        assert np.all(a != b)
    method = disentangled(_encoder(), OPTIMIZER, dataset=DATASET, **{**OPTIONS, "num_classes": 3000})
    head = method.init(jax.random.key(0), BATCHES[0]).variables["intrinsic"]["params"]["head"]
    chex.assert_shape([head["kernel"], head["bias"]], [(2 * FEATURES, 3000), (3000,)])
    for values in head.values():
        bound = (2 * FEATURES) ** -0.5
        assert np.abs(values).max() <= bound
        np.testing.assert_allclose(values.std(), bound / 3**0.5, rtol=0.05)
        np.testing.assert_allclose(values.mean(), 0, atol=0.03 * bound + 0.01)


def test_the_permutation_is_another_for_another_key_and_matters_only_once_swapping_is_on():
    state = INIT(jax.random.key(0), BATCHES[0])
    for step in range(SWAP_START + 2):
        (ours, metrics), (others, other_metrics) = (
            UPDATE(state, BATCHES[step], jax.random.key(seed)) for seed in (1, 2)
        )
        assert metrics["swap_conflict"] != other_metrics["swap_conflict"]
        same = np.array_equal(*(s.variables["intrinsic"]["params"]["head"]["kernel"] for s in (ours, others)))
        assert same == (step <= SWAP_START)
        state = ours


def test_seeds_trained_as_one_program_are_those_trained_alone():
    keys = jax.random.split(jax.random.key(0), 3)
    alone = [INIT(key, BATCHES[0]) for key in keys]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    update_together = jax.jit(jax.vmap(METHOD.update, in_axes=(0, None, 0)))
    for batch in BATCHES[: SWAP_START + 3]:
        together, metrics = update_together(together, batch, keys)
        alone, metrics_alone = zip(*[UPDATE(state, batch, key) for state, key in zip(alone, keys)])
    assert all(value.shape == (3,) and np.isfinite(value).all() for value in metrics.values())
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(alone, metrics_alone))
    chex.assert_trees_all_close((together, metrics), expected, atol=1e-5)


@pytest.mark.parametrize("step", [0, SWAP_START + 1])
def test_a_memorised_batch_has_finite_metrics_and_no_weight(step):
    state = INIT(jax.random.key(0), BATCHES[0])
    label = np.int32(1)
    variables = jax.tree.map(jnp.zeros_like, state.variables)
    for branch in variables.values():
        branch["params"]["head"]["bias"] = 1e4 * jax.nn.one_hot(label, CLASSES)
    state = state._replace(variables=variables, step=jnp.int32(step))
    batch = {**BATCHES[0], "label": np.full_like(BATCHES[0]["label"], label)}
    state, metrics = UPDATE(state, batch, jax.random.key(1))
    assert metrics["accuracy"] == metrics["biased_accuracy"] == 1
    assert metrics["weight"] == metrics["loss"] == 0
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
    with pytest.raises(UserError, match=message):
        disentangled(_encoder(), OPTIMIZER, dataset=DATASET, **{**OPTIONS, **arguments})


def test_batches_without_index_are_refused():
    with pytest.raises(UserError, match="no 'index'"):
        METHOD.init(jax.random.key(0), {"image": BATCHES[0]["image"], "label": BATCHES[0]["label"]})
