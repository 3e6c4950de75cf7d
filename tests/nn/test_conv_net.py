import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.nn.conv_net import conv_net


def torch_conv_net(order):
    torch = pytest.importorskip("torch")

    class ConvNet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            bias = order == "swap"
            self.conv1 = torch.nn.Conv2d(2, 4, 3, stride=1, padding=1, bias=bias)
            self.norm1 = torch.nn.BatchNorm2d(4)
            self.conv2 = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=bias)
            self.norm2 = torch.nn.BatchNorm2d(6)
            self.head = torch.nn.Linear(6, 3)

        def forward(self, x):
            for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
                x = conv(x)
                x = norm(x).relu() if order == "convention" else norm(x.relu())
            x = x.mean((2, 3))
            return {"logits": self.head(x), "features": x}

    torch.manual_seed(0)
    return ConvNet()


@pytest.mark.parametrize("order", ["convention", "swap"])
def test_conv_net_agrees_with_torch_on_even_and_odd_sides_and_has_a_bias_only_where_no_norm_follows(
    order, assert_agrees_with_torch
):
    network = conv_net(3, channels=(4, 6), strides=(1, 2), order=order)
    assert_agrees_with_torch(network, torch_conv_net(order), (5, 6, 7, 2))


def test_gradients_agree_with_torch(torch_variables):
    torch = pytest.importorskip("torch")
    network, module = conv_net(3, channels=(4, 6), strides=(1, 2)), torch_conv_net("convention")
    variables = torch_variables(module)
    x = np.random.default_rng(0).normal(0, 1, (5, 6, 7, 2)).astype(np.float32)

    def loss(params):
        outputs, _ = network.apply({**variables, "params": params}, x, train=True)
        return jnp.square(outputs["logits"]).sum()

    module(torch.from_numpy(x).permute(0, 3, 1, 2))["logits"].square().sum().backward()
    for parameter in module.parameters():
        parameter.data = parameter.grad
    grads = jax.jit(jax.grad(loss))(variables["params"])
    chex.assert_trees_all_close(grads, torch_variables(module)["params"], rtol=1e-4, atol=1e-4)


def test_the_default_net_has_the_published_size_and_features():
    network = conv_net(10)
    images = jnp.zeros((2, 14, 14, 1))
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert count == 9 * (16 + 16 * 32 + 32 * 64) + 2 * (16 + 32 + 64) + 64 * 10 + 10
    outputs, _ = jax.eval_shape(lambda v: network.apply(v, images, train=False), variables)
    assert outputs["features"].shape == (2, 64)
    assert outputs["logits"].shape == (2, 10)


def test_images_without_a_channel_axis_are_refused():
    with pytest.raises(AssertionError, match="rank"):
        conv_net(10).init(jax.random.key(0), jnp.zeros((2, 14, 14)))


def test_channels_and_strides_of_different_length_are_the_users_error():
    with pytest.raises(UserError, match=r"network\.strides"):
        conv_net(10, channels=(4, 8), strides=(1, 2, 2))
