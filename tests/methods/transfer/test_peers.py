"""L2-SP, WiSE-FT, side-tuning, gradual unfreezing and Auto-RGN, each against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.core import UserError
from jaxlab.methods.transfer import interpolation, l2_sp, side_tuning, unfreezing
from jaxlab.nn.mlp import mlp
from tests.methods.transfer import problem

RNG = np.random.default_rng(0)
SGD = optax.sgd(0.1)


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "dense1": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)},
        "head": {"kernel": rng.normal(size=(4, 2)), "bias": rng.normal(size=2)},
    }


# --- L2-SP ---


def test_l2_sp_is_half_the_squares_from_the_anchor_or_from_zero():
    w, w0, (alpha, beta) = tree(0), tree(1), (0.3, 0.7)
    mask = jax.tree_util.tree_map_with_path(lambda path, _: path[0].key != "head", w)
    expected = alpha / 2 * sum(np.sum((w["dense1"][n] - w0["dense1"][n]) ** 2) for n in ("kernel", "bias"))
    expected += beta / 2 * sum(np.sum(w["head"][n] ** 2) for n in ("kernel", "bias"))
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(l2_sp.l2_sp)(jax.tree.map(jnp.asarray, w), w0, mask, alpha, beta)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(
        gradient["dense1"]["bias"], alpha * (w["dense1"]["bias"] - w0["dense1"]["bias"])
    )
    np.testing.assert_allclose(gradient["head"]["kernel"], beta * w["head"]["kernel"])


@pytest.mark.parametrize("kernels_only", [True, False])
def test_an_anchored_step_is_a_step_on_loss_and_penalty(kernels_only):
    w = jax.tree.map(jnp.float32, tree(0))
    optimizer = l2_sp.anchored(SGD, alpha=0.3, beta=0.7, kernels_only=kernels_only)
    state, gradient = optimizer.init(tree(1)), jax.tree.map(jnp.ones_like, w)
    moves, state = optimizer.update(gradient, state, w)
    for module, name in ((m, n) for m in w for n in w[m]):
        drawn = 0.7 * w[module][name] if module == "head" else 0.3 * (w[module][name] - tree(1)[module][name])
        expected = -0.1 * (1 + (drawn if name == "kernel" or not kernels_only else 0))
        np.testing.assert_allclose(
            moves[module][name], np.broadcast_to(expected, w[module][name].shape), rtol=1e-5
        )
    jax.tree.map(np.testing.assert_array_equal, state.anchor, tree(1))


@pytest.mark.slow
def test_l2_sp_stays_nearer_to_the_start():
    distances = []
    for alpha in (0.0, 3.0):
        state, _ = problem.run(l2_sp.fine_tune(problem.NETWORK, SGD, alpha=alpha, beta=0.0), 8)
        moved = jax.tree.map(
            lambda x, y: jnp.sum((x - y) ** 2), state.variables["params"], state.initial["params"]
        )
        distances.append(float(moved["dense1"]["kernel"] + moved["dense2"]["kernel"]))
    assert 0 < distances[1] < 0.7 * distances[0]


# --- WiSE-FT ---


def test_interpolation_is_its_formula_with_and_without_fisher():
    theta = [{"params": tree(i), "batch_stats": {"mean": RNG.normal(size=2)}} for i in (0, 1)]
    for alpha in (0.0, 0.25, 1.0):
        merged = interpolation.interpolate(*theta, alpha)
        expected = jax.tree.map(lambda x, y, a=alpha: (1 - a) * x + a * y, *theta)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), merged, expected)
    # Of one tensor only; below the floor in one place.
    fishers = [
        {"params": {"head": {"bias": np.array([0.0, 4.0])}}},
        {"params": {"head": {"bias": np.array([2.0, 1.0])}}},
    ]
    merged = interpolation.interpolate(*theta, 0.25, fishers, 0.5)
    c0, c1 = 0.75 * np.array([0.5, 4.0]), 0.25 * np.array([2.0, 1.0])
    b0, b1 = (t["params"]["head"]["bias"] for t in theta)
    np.testing.assert_allclose(merged["params"]["head"]["bias"], (c0 * b0 + c1 * b1) / (c0 + c1), rtol=1e-6)
    plain = interpolation.interpolate(*theta, 0.25)
    np.testing.assert_allclose(merged["params"]["dense1"]["kernel"], plain["params"]["dense1"]["kernel"])
    with pytest.raises(UserError, match="differ in"):
        interpolation.interpolate(theta[0], {"params": tree(1)}, 0.5)


def test_no_information_at_all_divides_by_nothing():
    zeros = jax.tree.map(np.zeros_like, tree(0))
    merged = interpolation.interpolate(tree(0), tree(1), 0.5, (zeros, zeros))
    jax.tree.map(
        lambda x, a, b: np.testing.assert_allclose(x, (a + b) / 2, rtol=1e-5), merged, tree(0), tree(1)
    )


@pytest.mark.slow
def test_the_fisher_information_is_the_mean_of_squared_gradients():
    data = problem.batch(3, 10)
    variables = problem.NORMALIZED.init(problem.KEY, data["image"])
    ours = interpolation.diagonal_fisher(problem.NORMALIZED, variables, data, batch_size=4)

    @jax.jit
    @jax.grad
    def gradient(params, image, label):
        outputs, _ = problem.NORMALIZED.apply({**variables, "params": params}, image[None], train=False)
        return jax.nn.log_softmax(outputs["logits"])[0, label]

    squares = [
        jax.tree.map(jnp.square, gradient(variables["params"], data["image"][i], data["label"][i]))
        for i in range(8)
    ]
    expected = jax.tree.map(lambda *g: sum(g) / 8, *squares)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-8), ours, expected)


def test_wise_ft_is_between_the_networks_it_is_handed():
    image = problem.batch()["image"]
    ends = [problem.NORMALIZED.init(jax.random.key(i), image) for i in (0, 1)]
    networks = [problem.NORMALIZED._replace(init=lambda key, x, v=v: v) for v in ends]
    state = interpolation.wise_ft(*networks, alpha=0.25).init(problem.KEY, problem.batch())
    expected = interpolation.interpolate(*ends, 0.25)
    jax.tree.map(np.testing.assert_array_equal, state.variables, expected)
    jax.tree.map(np.testing.assert_array_equal, state.initial, ends[0])
    with pytest.raises(UserError, match="0 to 1"):
        interpolation.wise_ft(*networks, alpha=1.5)


# --- Side-tuning ---


def test_the_merge_is_a_convex_sum():
    base, side = RNG.normal(size=(3, 4)), RNG.normal(size=(3, 4))
    np.testing.assert_allclose(side_tuning.side_merge(base, side, 0.0), (base + side) / 2, rtol=1e-6)
    a = 1 / (1 + np.exp(-1.3))
    np.testing.assert_allclose(side_tuning.side_merge(base, side, 1.3), a * base + (1 - a) * side, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["alpha", "sum"])
def test_side_tuning_trains_all_but_the_base(merge):
    base = mlp(7, hidden=(6, 5), norm="batch_norm")
    method = side_tuning.side_tuning(problem.NORMALIZED, SGD, pretrained_network=base, merge=merge)
    state, _ = problem.run(method, 3)
    before, after = jax.device_get((state.initial, state.variables))
    trained = {"side", "head"} | ({"raw_alpha"} if merge == "alpha" else set())
    assert problem.changed(before["params"], after["params"]) == trained
    assert problem.changed(before["batch_stats"], after["batch_stats"]) == {"side"}
    image = problem.batch()["image"]
    outputs = method.predict(state, problem.batch())
    features = [
        network.apply(
            {"params": p, "batch_stats": after["batch_stats"][name]["batch_stats"]}, image, train=False
        )[0]["features"]
        for network, name, p in (
            (base, "base", after["params"]["base"]),
            (problem.NORMALIZED, "side", {**after["params"]["side"], "head": after["params"]["head"]}),
        )
    ]
    merged = (
        sum(features) if merge == "sum" else side_tuning.side_merge(*features, after["params"]["raw_alpha"])
    )
    np.testing.assert_allclose(outputs["features"], merged, rtol=1e-5, atol=1e-6)
    head = after["params"]["head"]
    np.testing.assert_allclose(
        outputs["logits"], merged @ head["kernel"] + head["bias"], rtol=1e-4, atol=1e-5
    )


def test_features_of_two_widths_cannot_be_merged():
    method = side_tuning.side_tuning(problem.NETWORK, SGD, pretrained_network=mlp(3, hidden=(6, 4)))
    state = method.init(problem.KEY, problem.batch())
    with pytest.raises(UserError, match="make them equal"):
        method.update(state, problem.batch(), problem.KEY)


# --- Gradual unfreezing and Auto-RGN ---


def test_blocks_join_from_the_top():
    method = unfreezing.gradual_unfreezing(problem.NETWORK, SGD, steps=8, warmup=2, cooldown=2)
    state, joined, before = None, [], None
    for step in range(8):
        start = (
            problem.NETWORK.init(problem.KEY, problem.batch()["image"])["params"] if state is None else before
        )
        state, _ = problem.run(method, 1, state, first=step)
        joined.append(problem.changed(start, state.variables["params"]))
        before = jax.device_get(state.variables["params"])
    head, top, whole = {"head"}, {"head", "dense2"}, {"head", "dense2", "dense1"}
    # tuned(s) = ⌊(s - 2) / 3 · 2⌋ = 0, 0, 1, 2 for s = 2..5
    assert joined == [head, head, head, head, top, whole, whole, whole]


def test_the_rate_follows_the_factor():
    optimizer = unfreezing.gradually_unfrozen(optax.sgd(1.0), num_steps=5, gamma=2.0)
    w = jax.tree.map(jnp.float32, tree(0))
    state, ones = optimizer.init(w), jax.tree.map(jnp.ones_like, w)
    for step in range(5):
        moves, state = optimizer.update(ones, state, w)
        np.testing.assert_allclose(moves["head"]["bias"], -np.exp(2 * (1 - step / 4)), rtol=1e-5)
    with pytest.raises(UserError, match="fit into 5"):
        unfreezing.gradually_unfrozen(SGD, num_steps=5, warmup=4, cooldown=2)


def test_relative_norms_are_safe_for_a_tensor_of_zeros():
    w, g = tree(0), tree(1)
    w["head"]["bias"] = np.zeros(2)
    ratios = unfreezing.relative_grad_norms(w, g)
    kernel = np.linalg.norm(g["dense1"]["kernel"]) / np.linalg.norm(w["dense1"]["kernel"])
    np.testing.assert_allclose(ratios["dense1"]["kernel"], kernel, rtol=1e-6)
    assert ratios["head"]["bias"] == 0


def test_auto_rgn_measures_then_scales_the_moves_of_a_fresh_optimizer():
    w = {**jax.tree.map(jnp.float32, tree(0)), "norm1": {"scale": jnp.ones(4)}}
    optimizer = unfreezing.by_relative_gradient(
        optax.sgd(1.0, momentum=0.9), epoch_steps=5, measured_batches=2
    )
    state, update = optimizer.init(w), jax.jit(optimizer.update)
    gradients = [
        jax.tree.map(lambda x, i=i: jnp.float32(np.random.default_rng(i).normal(size=x.shape)), w)
        for i in range(10)
    ]
    for epoch in range(2):
        own = gradients[5 * epoch : 5 * epoch + 5]
        ratios = [unfreezing.relative_grad_norms(w, g) for g in own[:2]]
        means = jax.tree.map(lambda a, b: (a + b) / 2, *ratios)
        means["norm1"]["scale"] = 0.0
        largest = max(jax.tree.leaves(means))
        scale = jax.tree.map(lambda m, largest=largest: m / largest, means)
        momentum = jax.tree.map(jnp.zeros_like, w)
        for step, gradient in enumerate(own):
            moves, state = update(gradient, state, w)
            if step < 2:
                expected = jax.tree.map(jnp.zeros_like, w)
            else:
                momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradient)
                expected = jax.tree.map(lambda s, m: -s * m, scale, momentum)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), moves, expected)
    with pytest.raises(UserError, match="measured_batches is 5"):
        unfreezing.by_relative_gradient(SGD, epoch_steps=5)


@pytest.mark.slow
def test_auto_rgn_is_a_method():
    state, metrics = problem.run(
        unfreezing.auto_rgn(problem.NORMALIZED, optax.adam(0.01), epoch_steps=4, measured_batches=1), 4
    )
    assert problem.changed(state.initial["params"], state.variables["params"]) <= {"dense1", "dense2", "head"}
    assert "head" in problem.changed(state.initial["params"], state.variables["params"])
    assert all(np.isfinite(m["loss"]) for m in metrics)
