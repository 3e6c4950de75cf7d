import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.nn.conv_net import conv_net
from jaxlab.nn.layers import HE_NORMAL, classify, dense
from jaxlab.nn.mlp import mlp
from jaxlab.nn.resnet import resnet
from jaxlab.nn.wide_resnet import wide_resnet


class Linear(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        return dense(x, self.features, name="linear")


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        return classify(x, 3)


def test_dense_starts_with_kernel_and_bias_uniform_within_one_over_root_fan_in():
    variables = jax.jit(Linear(2000).init)(jax.random.key(0), np.zeros((1, 25), np.float32))
    params = jax.tree.map(np.asarray, variables["params"]["linear"])
    assert params["kernel"].shape == (25, 2000)
    for values in (params["kernel"], params["bias"]):
        assert np.abs(values).max() <= 0.2
        assert np.abs(values).max() > 0.199
        np.testing.assert_allclose(np.var(values), 0.2**2 / 3, rtol=0.06)


def test_he_normal_has_variance_two_over_fan_in_and_is_not_truncated():
    kernel = np.asarray(HE_NORMAL(jax.random.key(0), (3, 3, 8, 4000), jnp.float32))
    std = np.sqrt(2 / (3 * 3 * 8))
    np.testing.assert_allclose(kernel.std(), std, rtol=0.01)
    assert np.abs(kernel).max() > 4 * std


def test_classify_is_a_float32_linear_head_on_the_features_it_returns():
    x = np.linspace(-1, 1, 10).reshape(2, 5).astype(jnp.bfloat16)
    outputs, variables = jax.jit(Classifier().init_with_output)(jax.random.key(0), x)
    head = variables["params"]["head"]
    assert head["kernel"].shape == (5, 3)
    assert head["bias"].shape == (3,)
    assert outputs["features"].dtype == outputs["logits"].dtype == jnp.float32
    np.testing.assert_allclose(
        outputs["logits"], outputs["features"] @ head["kernel"] + head["bias"], atol=1e-6
    )


@pytest.mark.parametrize(
    "network",
    [
        mlp,
        conv_net,
        functools.partial(resnet, depth=20),
        functools.partial(wide_resnet, depth=10, widen_factor=1, dropout_rate=0.0),
    ],
    ids=["mlp", "conv_net", "resnet", "wide_resnet"],
)
def test_a_network_without_classes_is_the_classifier_without_head_and_logits(network):
    images = np.zeros((2, 8, 8, 3), np.float32)

    def shapes(num_classes):
        def run(key):
            variables = network(num_classes).init(key, images)
            return variables, network(num_classes).apply(variables, images, train=True)

        return jax.eval_shape(run, jax.random.key(0))

    (encoder, (features, updated)), (classifier, (outputs, _)) = shapes(None), shapes(3)
    assert classifier["params"].pop("head")
    assert encoder == classifier == updated
    assert features == {"features": outputs["features"]}
    assert outputs["logits"].shape == (2, 3)
