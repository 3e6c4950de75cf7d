import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.nn.mnist_cnn import mnist_cnn

CHANNELS, STRIDES = (2, 64, 128, 128, 128), (1, 2, 1, 1)


def torch_mnist_cnn():
    torch = pytest.importorskip("torch")

    class MNISTCNN(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i, (in_channels, channels, stride) in enumerate(
                zip(CHANNELS, CHANNELS[1:], STRIDES), start=1
            ):
                setattr(self, f"conv{i}", torch.nn.Conv2d(in_channels, channels, 3, stride, padding=1))
                norm = torch.nn.GroupNorm(8, channels)
                torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
                torch.nn.init.normal_(norm.bias)
                setattr(self, f"norm{i}", norm)
            self.head = torch.nn.Linear(128, 3)

        def forward(self, x):
            for i in range(1, 5):
                x = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x).relu())
            x = x.mean((2, 3))
            return {"logits": self.head(x), "features": x}

    torch.manual_seed(0)
    return MNISTCNN()


def test_it_agrees_with_torch(assert_agrees_with_torch):
    assert_agrees_with_torch(mnist_cnn(3), torch_mnist_cnn(), (3, 8, 7, 2))


def test_it_starts_as_pytorch_does():
    params = jax.jit(mnist_cnn(10).init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 4, 4, 2)))["params"]
    fan_in = {f"conv{i}": 9 * channels for i, channels in enumerate(CHANNELS[:4], start=1)} | {"head": 128}
    for name, fan in fan_in.items():
        bound = fan**-0.5
        kernel, bias = (np.abs(params[name][leaf]) for leaf in ("kernel", "bias"))
        assert 0.99 * bound < kernel.max() <= bound
        assert 0.5 * bound < bias.max() <= bound
        np.testing.assert_allclose(np.std(params[name]["kernel"]), bound / 3**0.5, rtol=0.05)
    for i in range(1, 5):
        np.testing.assert_array_equal(params[f"norm{i}"]["scale"], 1)
        np.testing.assert_array_equal(params[f"norm{i}"]["bias"], 0)
