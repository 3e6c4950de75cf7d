"""Weights of torchvision give what its ResNets compute, held against PyTorch modules with its names."""

import chex
import jax
import numpy as np
import pytest

from jaxlab.core import UserError, build
from jaxlab.nn.imagenet_resnet import imagenet_resnet
from third_party.torch_checkpoints import read_state_dict
from third_party.torchvision_resnet import torchvision_resnet, torchvision_resnet_variables

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
IMAGES = np.random.default_rng(0).normal(0.5, 2.0, (3, 65, 50, 3)).astype(np.float32)


def torch_resnet(depth, num_classes=7):
    torch = pytest.importorskip("torch")
    nn = torch.nn

    def conv(inputs, outputs, size, stride=1):
        return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            if depth == 50:
                shapes = ((inputs, width, 1), (width, width, 3, stride), (width, 4 * width, 1))
            else:
                shapes = ((inputs, width, 3, stride), (width, width, 3))
            self.count = len(shapes)
            for i, shape in enumerate(shapes, start=1):
                self.add_module(f"conv{i}", conv(*shape))
                self.add_module(f"bn{i}", nn.BatchNorm2d(shape[1]))
            outputs, self.downsample = shapes[-1][1], None
            if stride != 1 or inputs != outputs:
                self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

        def forward(self, x):
            shortcut = x if self.downsample is None else self.downsample(x)
            for i in range(1, self.count + 1):
                x = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(x))
                x = torch.relu(x if i < self.count else x + shortcut)
            return x

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1, inputs = conv(3, 64, 7, 2), nn.BatchNorm2d(64), 64
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
            for g, count in enumerate(BLOCKS[depth], start=1):
                width, blocks = 32 * 2**g, []
                for b in range(count):
                    blocks.append(Block(inputs, width, 2 if g > 1 and b == 0 else 1))
                    inputs = 4 * width if depth == 50 else width
                self.add_module(f"layer{g}", nn.Sequential(*blocks))
            self.fc = nn.Linear(inputs, num_classes)

        def forward(self, x):
            x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
            x = self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))
            return {"logits": self.fc(x), "features": x}

    return ResNet()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(depth) -> (module, path)`: a module that is away from its start, and its file."""
    torch = pytest.importorskip("torch")
    made = {}

    def make(depth):
        if depth not in made:
            torch.manual_seed(0)
            module = torch_resnet(depth)
            for layer in module.modules():
                if isinstance(layer, torch.nn.Conv2d):
                    torch.nn.init.kaiming_normal_(layer.weight, mode="fan_out")
                if isinstance(layer, torch.nn.BatchNorm2d):
                    layer.weight.data.uniform_(0.3, 0.8)  # larger ones make rounding errors grow
                    layer.running_var.uniform_(0.5, 1.5)
                    for tensor in (layer.bias.data, layer.running_mean):
                        tensor.normal_(0, 0.3)
            path = tmp_path_factory.mktemp("weights") / f"resnet{depth}.pth"
            torch.save(module.state_dict(), path)
            made[depth] = module, str(path)
        return made[depth]

    return make


@pytest.fixture
def state_dict():
    """`state_dict(depth)`: zeros that take no memory."""
    torch = pytest.importorskip("torch")

    def make(depth):
        with torch.device("meta"):
            tensors = torch_resnet(depth).state_dict()
        return {name: np.broadcast_to(np.float32(0), tuple(value.shape)) for name, value in tensors.items()}

    return make


def assert_close(actual, expected, name, tolerance=1e-4):
    np.testing.assert_allclose(
        actual, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max(), err_msg=name
    )


@pytest.mark.parametrize("depth", [18, pytest.param(50, marks=pytest.mark.slow)])
def test_outputs_and_statistics_are_those_of_torch(depth, trained):
    import torch

    module, path = trained(depth)
    network = imagenet_resnet(7, depth=depth)
    variables = torchvision_resnet_variables(read_state_dict(path), num_classes=7)
    apply = jax.jit(network.apply, static_argnames="train")
    images = torch.from_numpy(np.moveaxis(IMAGES, -1, 1))
    for train in (False, True):
        outputs, variables = apply(variables, IMAGES, train=train)
        with torch.no_grad():
            expected = module.train(train)(images)
        for name, value in expected.items():
            assert np.std(value.numpy()) > 0.1
            assert_close(outputs[name], value.numpy(), name)
    buffers = {name: value.numpy() for name, value in module.state_dict().items()}
    expected = torchvision_resnet_variables(buffers, num_classes=7)["batch_stats"]
    jax.tree_util.tree_map_with_path(
        lambda path, actual, expected: assert_close(actual, expected, jax.tree_util.keystr(path)),
        variables["batch_stats"],
        expected,
    )


def test_a_network_from_a_config_starts_from_the_file_with_a_fresh_head(trained):
    _, path = trained(18)
    section = dict(name="third_party.torchvision_resnet:torchvision_resnet", path=path, depth=18)
    network = build("network", {**section, "freeze_batch_norm": True, "dropout_rate": 0.5}, num_classes=5)
    plain = imagenet_resnet(5, depth=18, freeze_batch_norm=True, dropout_rate=0.5)
    init = jax.jit(network.init)
    variables, other = (init(jax.random.key(seed), IMAGES) for seed in range(2))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        variables, jax.eval_shape(plain.init, jax.random.key(0), IMAGES)
    )
    head, other_head = variables["params"].pop("head"), other["params"].pop("head")
    assert np.any(head["kernel"] != other_head["kernel"])
    expected = torchvision_resnet_variables(read_state_dict(path), num_classes=None)
    chex.assert_trees_all_equal(variables, other, expected)


def test_without_classes_the_head_in_the_file_is_left_out(trained):
    _, path = trained(18)
    network = torchvision_resnet(None, path=path, depth=18)
    variables = jax.eval_shape(network.init, jax.random.key(0), IMAGES)
    assert "head" not in variables["params"]
    outputs = jax.eval_shape(lambda v: network.apply(v, IMAGES, train=False)[0], variables)
    assert set(outputs) == {"features"}


@pytest.mark.parametrize(
    ("depth", "name", "change", "message"),
    [
        (18, "conv1.weight", None, r"conv1\.weight: missing; .* ResNet-18"),
        (50, "layer3.5.bn2.running_var", None, r"layer3\.5\.bn2\.running_var: missing; .* ResNet-50"),
        (18, "fc.bias", None, r"fc\.bias: missing"),
        (
            18,
            "layer2.0.downsample.0.weight",
            np.transpose,
            r"layer2\.0\.downsample\.0\.weight: shape \(1, 1, 64, 128\), expected \(128, 64, 1, 1\)",
        ),
        (
            50,
            "conv1.weight",
            lambda weight: weight[:, :1],
            r"conv1\.weight: shape \(64, 1, 7, 7\), expected \(64, 3, 7, 7\)",
        ),
        (18, "layer1.0.se.weight", np.ravel, r"layer1\.0\.se\.weight: no part of torchvision's ResNet-18"),
        (34, "conv1.weight", np.array, r"layer1\.2\.conv1\.weight: no part of torchvision's ResNet-18"),
    ],
)
def test_a_wrong_tensor_is_named(state_dict, depth, name, change, message):
    tensors = state_dict(depth)
    value = tensors.pop(name, np.zeros(3))
    if change:
        tensors[name] = change(value)
    with pytest.raises(UserError, match=message):
        torchvision_resnet_variables(tensors, num_classes=7)


def test_a_head_of_other_classes_is_told(state_dict):
    with pytest.raises(
        UserError, match=r"num_classes: 10, but the head fc has 7 classes; give that number, or"
    ):
        torchvision_resnet_variables(state_dict(18), num_classes=10)


def test_a_file_of_another_network_and_images_of_other_channels_are_told(trained, tmp_path):
    torch = pytest.importorskip("torch")
    _, path = trained(18)
    with pytest.raises(UserError, match=r"depth: 50, but .*resnet18\.pth has a ResNet-18"):
        torchvision_resnet(5, path=path, depth=50)
    network = torchvision_resnet(5, path=path, depth=18)
    with pytest.raises(UserError, match=r"resnet18\.pth is for images of 3 channels, these have 1"):
        network.init(jax.random.key(0), IMAGES[..., :1])
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: .* missing; is this the state dict of torchvision's"):
        torchvision_resnet(5, path=str(tmp_path / "other.pth"), depth=50)
