import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.nn.vgg import ConvNormAct, vgg

IMAGES = jnp.zeros((2, 32, 32, 3))


def shapes(network, images=IMAGES):
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    return variables, jax.eval_shape(lambda v: network.apply(v, images, train=False)[0], variables)


def torch_vgg(order):
    torch = pytest.importorskip("torch")

    class Layer(torch.nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.conv = torch.nn.Conv2d(inputs, outputs, 3, padding=1, bias=order == "swap")
            self.norm = torch.nn.BatchNorm2d(outputs)

        def forward(self, x):
            x = self.conv(x)
            return torch.tanh(self.norm(x)) if order == "convention" else self.norm(torch.tanh(x))

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer1, self.layer2, self.layer3 = Layer(3, 4), Layer(4, 5), Layer(5, 6)
            self.head = torch.nn.Linear(6 * 2 * 3, 3)

        def forward(self, x):
            pool = torch.nn.functional.max_pool2d
            x = pool(self.layer3(pool(self.layer2(self.layer1(x)), 2)), 2)
            x = x.permute(0, 2, 3, 1).flatten(1)
            return {"logits": self.head(x), "features": x}

    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("order", ["convention", "swap"])
def test_vgg_in_either_order_agrees_with_torch(order, assert_agrees_with_torch):
    network = vgg(3, cfg=(4, 5, "M", 6, "M"), order=order, activation="tanh")
    assert_agrees_with_torch(network, torch_vgg(order), (4, 8, 13, 3))


@pytest.mark.parametrize(
    ("cfg", "use_bias", "parameters"),
    # Kernels, 2 a channel of batch normalisation, the head, and where there is one the bias of each channel.
    [
        ("vgg11", False, 9_217_728 + 2 * 2752 + 5130),
        ("vgg16", False, 14_710_464 + 2 * 4224 + 5130),
        ("vgg16", True, 14_710_464 + 3 * 4224 + 5130),
    ],
)
def test_variants_have_their_number_of_parameters(cfg, use_bias, parameters):
    variables, outputs = shapes(vgg(10, cfg=cfg, use_bias=use_bias))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    assert outputs["features"].shape == (2, 512)


def test_convolutions_start_normal_in_fan_out_and_biases_at_zero():
    network = vgg(10, cfg=(64, "M"), order="swap")

    @jax.jit
    def init(key):
        params = network.init(key, jnp.zeros((1, 8, 8, 32)))["params"]
        return params["layer1"]["conv"], params["head"]

    conv, head = jax.tree.map(np.asarray, init(jax.random.key(0)))
    np.testing.assert_allclose(conv["kernel"].std(), np.sqrt(2 / (9 * 64)), rtol=0.02)
    np.testing.assert_allclose(head["kernel"].std(), 0.01, rtol=0.05)
    assert not np.any(conv["bias"])
    assert not np.any(head["bias"])


@pytest.mark.parametrize(
    ("order", "norm", "use_bias", "has_bias"),
    [
        ("convention", "batch_norm", None, False),
        ("convention", "batch_norm", True, True),
        ("convention", None, None, True),
        ("swap", "batch_norm", None, True),
        ("swap", "batch_norm", False, False),
    ],
)
def test_a_convolution_has_a_bias_where_nothing_cancels_it_or_as_told(order, norm, use_bias, has_bias):
    module = ConvNormAct(features=4, kernel=5, order=order, norm=norm, use_bias=use_bias)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), IMAGES, train=False))
    assert ("bias" in variables["params"]["conv"]) == has_bias
    assert ("norm" in variables["params"]) == (norm is not None)
    assert variables["params"]["conv"]["kernel"].shape == (5, 5, 3, 4)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [("vgg17", "no 'vgg17'. Did you mean 'vgg1"), ((8, "m"), "expected channels and 'M'")],
)
def test_an_unknown_layout_is_the_users_error(cfg, message):
    with pytest.raises(UserError, match=message):
        vgg(10, cfg=cfg)


def test_too_many_poolings_are_the_users_error():
    with pytest.raises(UserError, match="leave nothing of images"):
        shapes(vgg(10), jnp.zeros((2, 28, 28, 1)))
