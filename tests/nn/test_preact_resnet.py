import jax
import jax.numpy as jnp
import pytest

from jaxlab.nn.linen import from_linen
from jaxlab.nn.preact_resnet import PreActResNet, preact_resnet
from jaxlab.nn.resnet import Layout


def torch_preact_resnet(order):
    torch = pytest.importorskip("torch")
    nn, bias = torch.nn, order == "swap"

    def pair(norm, x):
        return torch.tanh(norm(x)) if order == "convention" else norm(torch.tanh(x))

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
            activated = pair(self.norm1, x)
            h = self.conv2(pair(self.norm2, self.conv1(activated)))
            return h + (self.shortcut(activated) if hasattr(self, "shortcut") else x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=bias)
            self.group1_block1, self.group2_block1 = Block(4, 4, 1), Block(4, 6, 2)
            self.norm = nn.BatchNorm2d(6)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            x = self.group2_block1(self.group1_block1(self.stem(x)))
            x = pair(self.norm, x).mean((2, 3))
            return {"logits": self.head(x), "features": x}

    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("order", ["convention", "swap"])
def test_preact_resnet_in_either_order_agrees_with_torch(order, assert_agrees_with_torch):
    module = PreActResNet(
        Layout(channels=(4, 6), blocks=(1, 1), project=True), num_classes=3, order=order, activation="tanh"
    )
    assert_agrees_with_torch(from_linen(module), torch_preact_resnet(order), (4, 6, 5, 3))


def test_depth_18_has_its_number_of_parameters_and_a_bias_in_swap():
    def shapes(order):
        network, images = preact_resnet(10, depth=18, order=order), jnp.zeros((2, 32, 32, 3))
        variables = jax.eval_shape(network.init, jax.random.key(0), images)
        return variables["params"], jax.eval_shape(
            lambda v: network.apply(v, images, train=False)[0], variables
        )

    params, outputs = shapes("convention")
    # The CIFAR ResNet-18's 11,173,962; less the norms of its stem (64) and shortcuts (128, 256, 512), each two
    # a channel, plus the last norm here (512); the first norm of a group has half as many channels.
    fewer = 2 * (64 + 128 + 256 + 512) - 2 * 512 + 2 * (64 + 128 + 256)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 11_173_962 - fewer
    assert outputs["features"].shape == (2, 512)
    assert set(shapes("swap")[0]["stem"]) == {"kernel", "bias"}
