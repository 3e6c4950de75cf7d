import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.nn.wide_resnet import wide_resnet


def torch_wide_resnet(*, blocks, widen_factor, dropout_rate, order):
    torch = pytest.importorskip("torch")
    nn = torch.nn

    bias = order == "swap"

    def norm_relu(norm, x):
        return torch.relu(norm(x)) if order == "convention" else norm(torch.relu(x))

    class Block(nn.Module):
        def __init__(self, inputs, features, stride):
            super().__init__()
            self.norm1 = nn.BatchNorm2d(inputs)
            self.conv1 = nn.Conv2d(inputs, features, 3, stride=stride, padding=1, bias=bias)
            self.norm2 = nn.BatchNorm2d(features)
            self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=bias)
            if inputs != features:
                self.shortcut = nn.Conv2d(inputs, features, 1, stride=stride, bias=False)

        def forward(self, x):
            activated = norm_relu(self.norm1, x)
            h = norm_relu(self.norm2, self.conv1(activated))
            h = self.conv2(nn.functional.dropout(h, dropout_rate, self.training))
            return h + (self.shortcut(activated) if hasattr(self, "shortcut") else x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=bias)
            inputs, self.names = 16, []
            for g, stride in ((1, 1), (2, 2), (3, 2)):
                for b in range(1, blocks + 1):
                    features = 2**g * 8 * widen_factor
                    self.names.append(f"group{g}_block{b}")
                    self.add_module(self.names[-1], Block(inputs, features, stride if b == 1 else 1))
                    inputs = features
            self.norm = nn.BatchNorm2d(inputs)
            self.head = nn.Linear(inputs, 5)

        def forward(self, x):
            x = self.stem(x)
            for name in self.names:
                x = self.get_submodule(name)(x)
            x = norm_relu(self.norm, x).mean((2, 3))
            return {"logits": self.head(x), "features": x}

    torch.manual_seed(0)
    return Net()


# At rate 1 both libraries drop the same units: all of them, which shows where dropout stands.
@pytest.mark.parametrize(
    ("blocks", "widen_factor", "dropout_rate", "order"),
    [(2, 1, 0.0, "convention"), (1, 2, 1.0, "swap")],
)
def test_wide_resnet_agrees_with_torch(blocks, widen_factor, dropout_rate, order, assert_agrees_with_torch):
    network = wide_resnet(
        5, depth=6 * blocks + 4, widen_factor=widen_factor, dropout_rate=dropout_rate, order=order
    )
    module = torch_wide_resnet(
        blocks=blocks, widen_factor=widen_factor, dropout_rate=dropout_rate, order=order
    )
    assert_agrees_with_torch(network, module, (4, 8, 8, 3), key=jax.random.key(0))


@pytest.mark.parametrize(("classes", "parameters"), [(10, 2_243_546), (100, 2_255_156)])
def test_wrn_40_2_has_the_published_number_of_parameters(classes, parameters):
    network = wide_resnet(classes)
    images = jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    outputs, _ = jax.eval_shape(lambda v: network.apply(v, images, train=False), variables)
    assert outputs["features"].shape == (2, 128)
    assert outputs["logits"].shape == (2, classes)


def test_convolutions_start_normal_in_fan_out_and_the_head_uniform_without_bias():
    network = wide_resnet(10, depth=10, widen_factor=1)
    images = jnp.zeros((1, 8, 8, 3))

    @jax.jit  # only the leaves that are returned are compiled
    def init(key):
        params = network.init(key, images)["params"]
        return params["group3_block1"]["conv1"]["kernel"], params["head"]

    conv, head = jax.tree.map(np.asarray, init(jax.random.key(0)))
    std = np.sqrt(2 / (9 * 64))
    np.testing.assert_allclose(conv.std(), std, rtol=0.02)
    assert np.abs(conv).max() > 3 * std  # not truncated
    assert 0.99 / 8 < np.abs(head["kernel"]).max() <= 1 / 8
    assert not np.any(head["bias"])


def test_bfloat16_keeps_parameters_statistics_and_outputs_in_float32():
    network = wide_resnet(10, depth=10, dtype="bfloat16")
    images, key = jnp.zeros((2, 32, 32, 3)), jax.random.key(0)
    variables = jax.eval_shape(network.init, key, images)
    results = jax.eval_shape(lambda v: network.apply(v, images, train=True, key=key), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, results))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("depth", [4, 28 + 1, 38])
def test_a_depth_that_is_not_6n_plus_4_is_the_users_error(depth):
    with pytest.raises(UserError, match=r"network\.depth"):
        wide_resnet(10, depth=depth)
