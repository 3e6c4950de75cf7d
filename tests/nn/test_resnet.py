import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.nn.layers import HE_NORMAL
from jaxlab.nn.linen import from_linen
from jaxlab.nn.resnet import Layout, ResNet, resnet


def torch_resnet(channels, blocks, *, project, order="convention"):
    torch = pytest.importorskip("torch")
    nn, relu, bias = torch.nn, torch.relu, order == "swap"

    class Block(nn.Module):
        def __init__(self, inputs, features, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, features, 3, stride=stride, padding=1, bias=bias)
            self.norm1 = nn.BatchNorm2d(features)
            self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=bias)
            self.norm2 = nn.BatchNorm2d(features)
            self.padding = (features - inputs) // 2
            if project and inputs != features:
                self.shortcut_conv = nn.Conv2d(inputs, features, 1, stride=stride, bias=False)
                self.shortcut_norm = nn.BatchNorm2d(features)

        def forward(self, x):
            if hasattr(self, "shortcut_conv"):
                shortcut = self.shortcut_norm(self.shortcut_conv(x))
            elif self.padding:
                shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
            else:
                shortcut = x
            if order == "convention":
                return relu(self.norm2(self.conv2(relu(self.norm1(self.conv1(x))))) + shortcut)
            return self.norm2(relu(self.conv2(self.norm1(relu(self.conv1(x)))))) + shortcut

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, channels[0], 3, padding=1, bias=bias)
            self.stem_norm = nn.BatchNorm2d(channels[0])
            inputs, self.names = channels[0], []
            for g, (features, count) in enumerate(zip(channels, blocks), start=1):
                for b in range(1, count + 1):
                    self.names.append(f"group{g}_block{b}")
                    self.add_module(self.names[-1], Block(inputs, features, 2 if g > 1 and b == 1 else 1))
                    inputs = features
            self.head = nn.Linear(inputs, 5)

        def forward(self, x):
            x = self.stem(x)
            x = relu(self.stem_norm(x)) if order == "convention" else self.stem_norm(relu(x))
            for name in self.names:
                x = self.get_submodule(name)(x)
            x = x.mean((2, 3))
            return {"logits": self.head(x), "features": x}

    torch.manual_seed(0)
    return Net()


def test_resnet20_agrees_with_torch(assert_agrees_with_torch):
    module = torch_resnet((16, 32, 64), (3, 3, 3), project=False)
    assert_agrees_with_torch(resnet(5, depth=20), module, (4, 8, 8, 3))


@pytest.mark.parametrize("order", ["convention", "swap"])
def test_projection_shortcuts_in_either_order_agree_with_torch(order, assert_agrees_with_torch):
    network = from_linen(
        ResNet(
            num_classes=5,
            layout=Layout(channels=(4, 8), blocks=(1, 2), project=True),
            order=order,
            activation=jax.nn.relu,
            use_bias=order == "swap",
            kernel_init=HE_NORMAL,
            dtype=jnp.float32,
        )
    )
    assert_agrees_with_torch(network, torch_resnet((4, 8), (1, 2), project=True, order=order), (4, 5, 6, 3))


@pytest.mark.parametrize(
    ("depth", "parameters", "features"), [(20, 269_722, 64), (18, 11_173_962, 512), (34, 21_282_122, 512)]
)
def test_each_depth_has_its_known_number_of_parameters(depth, parameters, features):
    network = resnet(10, depth=depth)
    images = jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    outputs, _ = jax.eval_shape(lambda v: network.apply(v, images, train=False), variables)
    assert outputs["features"].shape == (2, features)


def test_bfloat16_keeps_parameters_statistics_and_outputs_in_float32():
    network = resnet(10, depth=20, dtype="bfloat16")
    images = jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    results = jax.eval_shape(lambda v: network.apply(v, images, train=True), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, results))} == {jnp.dtype("float32")}


def test_kernels_start_he_normal():
    network = resnet(10, depth=20)
    images = jnp.zeros((1, 8, 8, 3))

    @jax.jit  # only the leaves that are returned are compiled
    def init(key):
        params = network.init(key, images)["params"]
        return params["group3_block2"]["conv1"]["kernel"], params["head"]["kernel"]

    conv, head = map(np.asarray, init(jax.random.key(0)))
    np.testing.assert_allclose(np.std(conv), np.sqrt(2 / (9 * 64)), rtol=0.02)
    np.testing.assert_allclose(np.std(head), np.sqrt(2 / 64), rtol=0.1)


def test_activations_are_handed_out_in_the_order_of_the_layers():
    network = resnet(10, depth=20, activation="tanh")
    images = jnp.zeros((2, 8, 8, 3))
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    variables = {**variables, "intermediates": {}}
    outputs, _ = jax.eval_shape(lambda v: network.apply(v, images, train=False), variables)
    shapes = [(2, 8, 8, 16)] * 7 + [(2, 4, 4, 32)] * 6 + [(2, 2, 2, 64)] * 6
    for name in ("act", "out"):
        assert [layer[name].shape for layer in outputs["activations"]] == shapes
