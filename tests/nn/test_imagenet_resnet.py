"""What the networks compute is held against PyTorch in tests/third_party/test_torchvision_resnet.py."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.nn.imagenet_resnet import imagenet_resnet

IMAGES = np.random.default_rng(0).normal(0.5, 1.0, (2, 64, 48, 3)).astype(np.float32)


def random_variables(network):
    """Variables whose running statistics are not those of any batch, for which nothing is compiled."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), IMAGES)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        return rng.normal(0, 0.05, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize(
    ("depth", "num_classes", "parameters", "outputs"),
    [
        (18, 1000, 11_689_512, {"logits": (2, 1000), "features": (2, 512)}),
        (50, 1000, 25_557_032, {"logits": (2, 1000), "features": (2, 2048)}),
        (18, None, 11_689_512 - 1000 * 513, {"features": (2, 512)}),
        (50, None, 25_557_032 - 1000 * 2049, {"features": (2, 2048)}),
    ],
)
def test_each_depth_has_torchvisions_number_of_parameters(depth, num_classes, parameters, outputs):
    network = imagenet_resnet(num_classes, depth=depth)
    variables = jax.eval_shape(network.init, jax.random.key(0), IMAGES)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    made, _ = jax.eval_shape(lambda v: network.apply(v, IMAGES, train=False), variables)
    assert {name: value.shape for name, value in made.items()} == outputs


def test_frozen_statistics_normalise_in_training_and_stay_while_all_parameters_learn():
    network = imagenet_resnet(5, depth=18, freeze_batch_norm=True)
    variables = random_variables(network)

    @jax.jit
    def train(variables):
        def loss(params):
            outputs, updated = network.apply({**variables, "params": params}, IMAGES, train=True)
            return jnp.mean(outputs["logits"] ** 2), (outputs, updated)

        return jax.grad(loss, has_aux=True)(variables["params"])

    gradient, (outputs, updated) = train(variables)
    expected, _ = jax.jit(lambda v: network.apply(v, IMAGES, train=False))(variables)
    assert np.std(expected["logits"]) > 0.01
    chex.assert_trees_all_close(dict(outputs), dict(expected), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(updated["batch_stats"], variables["batch_stats"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.all(np.isfinite(leaf)), path
        assert np.any(leaf), path


def test_dropout_takes_the_features_that_the_head_is_given_in_training_only():
    network = imagenet_resnet(5, depth=18, dropout_rate=1.0)  # all of them
    variables = random_variables(network)
    apply = jax.jit(network.apply, static_argnames="train")
    outputs, _ = apply(variables, IMAGES, train=True, key=jax.random.key(0))
    assert not np.any(outputs["features"])
    bias = variables["params"]["head"]["bias"]
    np.testing.assert_array_equal(outputs["logits"], np.broadcast_to(bias, (2, 5)))
    outputs, _ = apply(variables, IMAGES, train=False)
    assert np.any(outputs["features"])


@pytest.mark.parametrize("depth", [18, pytest.param(50, marks=pytest.mark.slow)])
def test_bfloat16_keeps_parameters_statistics_and_outputs_in_float32(depth):
    network = imagenet_resnet(5, depth=depth, dtype="bfloat16")
    variables = jax.eval_shape(network.init, jax.random.key(0), IMAGES)
    results = jax.eval_shape(lambda v: network.apply(v, IMAGES, train=True), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, results))} == {jnp.dtype("float32")}
    jaxpr = str(jax.make_jaxpr(lambda v: network.apply(v, IMAGES, train=True))(variables))
    convolutions = re.findall(r"(\w+)\[[\d,]+\] = conv_general_dilated", jaxpr)
    assert convolutions == ["bf16"] * {18: 20, 50: 53}[depth]


@pytest.mark.parametrize(("depth", "features"), [(18, 512), pytest.param(50, 2048, marks=pytest.mark.slow)])
def test_kernels_start_as_torchvisions(depth, features):
    network = imagenet_resnet(1000, depth=depth)

    @jax.jit  # only the leaves that are returned are compiled
    def init(key):
        params = network.init(key, IMAGES)["params"]
        return params["stem"]["kernel"], params["group4_block2"]["conv2"]["kernel"], params["head"]["kernel"]

    stem, conv, head = map(np.asarray, init(jax.random.key(0)))
    np.testing.assert_allclose(np.std(stem), np.sqrt(2 / (49 * 64)), rtol=0.03)
    np.testing.assert_allclose(np.std(conv), np.sqrt(2 / (9 * 512)), rtol=0.01)
    assert 0.99 < np.abs(head).max() * np.sqrt(features) <= 1
