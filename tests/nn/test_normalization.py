import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.nn.activations import shifted
from jaxlab.nn.normalization import BatchNorm, norm_act_block

VARIABLES = {
    "params": {"scale": np.array([0.5, 2.0], np.float32), "bias": np.array([-1.0, 3.0], np.float32)},
    "batch_stats": {"mean": np.array([0.2, -0.3], np.float32), "var": np.array([1.5, 0.7], np.float32)},
}


@jax.jit
def train(x):
    y, updated = BatchNorm().apply(VARIABLES, x, train=True, mutable=["batch_stats"])
    return y, updated["batch_stats"]


@jax.jit
@jax.grad
def gradient_of_square(x):
    return jnp.square(train(x)[0]).sum()


def test_a_training_batch_is_normalised_with_the_biased_and_remembered_with_the_unbiased_variance():
    x = np.random.default_rng(0).normal(3, 2, (2, 3, 1, 2)).astype(np.float32)
    y, stats = train(x)
    rows = x.reshape(6, 2).astype(np.float64)
    scale, bias = VARIABLES["params"].values()
    expected = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected.reshape(x.shape), rtol=1e-5, atol=1e-5)
    old_mean, old_var = VARIABLES["batch_stats"].values()
    np.testing.assert_allclose(stats["mean"], 0.9 * old_mean + 0.1 * rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 * old_var + 0.1 * rows.var(0, ddof=1), rtol=1e-5)


def test_evaluation_uses_the_running_statistics():
    x = np.array([[1.0, 2.0]], np.float32)
    y = jax.jit(lambda x: BatchNorm().apply(VARIABLES, x, train=False))(x)
    np.testing.assert_allclose(
        y, [[0.8 / np.sqrt(1.50001) * 0.5 - 1, 2.3 / np.sqrt(0.70001) * 2 + 3]], rtol=1e-6
    )


def test_a_single_value_per_channel_gives_the_bias_and_finite_gradients():
    x = np.array([[4.0, -1.0]], np.float32)
    y, stats = train(x)
    np.testing.assert_array_equal(y[0], VARIABLES["params"]["bias"])
    np.testing.assert_allclose(stats["var"], 0.9 * VARIABLES["batch_stats"]["var"], rtol=1e-6)
    chex.assert_tree_all_finite(gradient_of_square(x))


def test_a_constant_channel_far_from_zero_stays_finite_and_has_no_variance():
    x = np.full((16, 2), 3e4, np.float32)
    y, stats = train(x)
    np.testing.assert_allclose(y, np.broadcast_to(VARIABLES["params"]["bias"], x.shape), atol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 * VARIABLES["batch_stats"]["var"], rtol=1e-6)
    chex.assert_tree_all_finite(gradient_of_square(x))


def test_statistics_of_bfloat16_inputs_are_accumulated_in_float32():
    x = np.repeat([[1.0, 1.0], [1.0625, 1.0625]], 4096, axis=0).astype(jnp.bfloat16)
    y, stats = train(x)
    assert y.dtype == jnp.bfloat16
    chex.assert_trees_all_equal_dtypes(stats, VARIABLES["batch_stats"])
    expected = 0.9 * VARIABLES["batch_stats"]["mean"] + 0.1 * 1.03125
    np.testing.assert_allclose(stats["mean"], expected, rtol=1e-6)


def test_value_statistics_and_gradient_agree_with_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    x, weights = rng.normal(1, 2, (2, 7, 2)).astype(np.float32)
    layer = torch.nn.BatchNorm1d(2)
    for name, value in (("weight", "scale"), ("bias", "bias")):
        getattr(layer, name).data = torch.tensor(VARIABLES["params"][value])
    for name, value in (("running_mean", "mean"), ("running_var", "var")):
        setattr(layer, name, torch.tensor(VARIABLES["batch_stats"][value]))
    x_torch = torch.from_numpy(x).requires_grad_()
    y_torch = layer(x_torch)
    (y_torch * torch.from_numpy(weights)).sum().backward()
    y, stats = train(x)
    np.testing.assert_allclose(y, y_torch.detach(), atol=1e-5)
    np.testing.assert_allclose(stats["mean"], layer.running_mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], layer.running_var, rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: (train(x)[0] * weights).sum()))(x)
    np.testing.assert_allclose(gradient, x_torch.grad, atol=1e-5)


def test_statistics_are_those_of_the_global_batch_on_eight_devices():
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = np.random.default_rng(2).normal(1, 2, (16, 2)).astype(np.float32)
    chex.assert_trees_all_close(train(jax.device_put(x, sharding)), train(x), atol=1e-5)


RNG = np.random.default_rng(3)
IMAGES, KERNEL = RNG.normal(size=(8, 5, 4, 3)), RNG.normal(size=(3, 3, 3, 2))
BIAS, WEIGHTS = RNG.normal(size=2), RNG.normal(size=(8, 5, 4, 2))
PARAMS, STATS = VARIABLES["params"], VARIABLES["batch_stats"]
IMAGES, KERNEL, BIAS, WEIGHTS = (np.float32(x) for x in (IMAGES, KERNEL, BIAS, WEIGHTS))


def block(x, kernel, params=PARAMS, stats=STATS, **keys):
    keys = {"order": "swap", "activation": "tanh", "train": True} | keys
    return jax.jit(lambda *arrays: norm_act_block(*arrays, **keys))(x, kernel, params, stats)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("order", ["convention", "swap"])
def test_a_block_in_either_order_agrees_with_torch(order, train):
    torch = pytest.importorskip("torch")
    norm = torch.nn.BatchNorm2d(2).train(train)
    for name, value in (("weight", PARAMS["scale"]), ("bias", PARAMS["bias"])):
        getattr(norm, name).data = torch.tensor(value)
    norm.running_mean, norm.running_var = torch.tensor(STATS["mean"]), torch.tensor(STATS["var"])
    h = torch.nn.functional.conv2d(
        torch.tensor(IMAGES).movedim(-1, 1),
        torch.tensor(KERNEL).permute(3, 2, 0, 1),
        torch.tensor(BIAS),
        padding=1,
    )
    with torch.no_grad():
        expected = torch.tanh(norm(h)) if order == "convention" else norm(torch.tanh(h))
    y, stats, aux = block(IMAGES, KERNEL, order=order, train=train, bias=BIAS)
    np.testing.assert_allclose(y, expected.movedim(1, -1), atol=1e-5)
    np.testing.assert_allclose(stats["mean"], norm.running_mean, atol=1e-6)
    np.testing.assert_allclose(stats["var"], norm.running_var, rtol=1e-5)
    act = expected if order == "convention" else torch.tanh(h)
    np.testing.assert_allclose(aux["act"], act.movedim(1, -1), atol=1e-5)
    np.testing.assert_array_equal(aux["out"], y)


def test_a_dense_block_is_a_convolution_over_one_pixel():
    rows, kernel = IMAGES[:, 0, 0], KERNEL[0, 0]
    dense, stats, _ = block(rows, kernel)
    conv, stats_of_conv, _ = block(rows[:, None, None], kernel[None, None])
    np.testing.assert_allclose(dense, conv[:, 0, 0], atol=1e-5)
    chex.assert_trees_all_close(stats, stats_of_conv, rtol=1e-5)


def test_statistics_over_a_mapped_axis_are_those_of_the_whole_batch():
    y, stats, _ = block(IMAGES, KERNEL)
    mapped = jax.pmap(
        lambda x: norm_act_block(
            x, KERNEL, PARAMS, STATS, order="swap", activation=jnp.tanh, train=True, axis_name="data"
        ),
        axis_name="data",
    )
    each, stats_of_each, _ = mapped(IMAGES.reshape(8, 1, 5, 4, 3))
    np.testing.assert_allclose(each.reshape(y.shape), y, atol=1e-5)
    for name in stats:
        np.testing.assert_allclose(stats_of_each[name], np.tile(stats[name], (8, 1)), rtol=1e-5)


def output_and_gradient(activation, kernel=KERNEL, params=PARAMS, order="swap"):
    def loss(kernel):
        y, *_ = norm_act_block(IMAGES, kernel, params, STATS, order=order, activation=activation, train=True)
        return (y * WEIGHTS).sum(), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(kernel)
    return y, gradient


def test_in_swap_the_output_offset_of_an_activation_is_removed_and_in_convention_it_is_not():
    plain, moved = (output_and_gradient(shifted("tanh", 1.0, offset)) for offset in (0.0, 3.0))
    chex.assert_trees_all_close(plain, moved, rtol=1e-4, atol=1e-4)
    stats = {**STATS, "mean": STATS["mean"] + 3}
    y, *_ = block(IMAGES, KERNEL, activation=shifted("tanh", 1.0), train=False)
    y_moved, *_ = block(IMAGES, KERNEL, PARAMS, stats, activation=shifted("tanh", 1.0, 3.0), train=False)
    np.testing.assert_allclose(y_moved, y, atol=1e-5)
    conventional = (output_and_gradient(shifted("tanh", 1.0, c), order="convention")[0] for c in (0.0, 3.0))
    np.testing.assert_allclose(np.subtract(*conventional), -3, atol=1e-5)


def test_in_swap_the_sign_of_a_shift_is_that_of_kernel_and_scale():
    y, gradient = output_and_gradient(shifted("tanh", 1.0))
    mirrored = {**PARAMS, "scale": -PARAMS["scale"]}
    y_mirrored, gradient_mirrored = output_and_gradient(shifted("tanh", -1.0), -KERNEL, mirrored)
    np.testing.assert_allclose(y_mirrored, y, atol=1e-5)
    np.testing.assert_allclose(gradient_mirrored, -gradient, atol=1e-4)


def test_in_swap_a_shift_is_a_frozen_bias():
    y, *_ = block(IMAGES, KERNEL, activation=shifted("tanh", 0.7))
    biased, *_ = block(IMAGES, KERNEL, bias=np.full(2, 0.7, np.float32))
    np.testing.assert_allclose(biased, y, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"), [({"order": "after"}, "order"), ({"activation": "tanhh"}, "Did")]
)
def test_an_unknown_order_or_activation_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        block(IMAGES, KERNEL, **keys)
