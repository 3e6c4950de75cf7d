import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.core import UserError
from jaxlab.nn.mlp import mlp


def torch_mlp(sizes, *, norm, order="convention", bias):
    torch = pytest.importorskip("torch")

    class MLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.depth = len(sizes) - 2
            for i in range(1, self.depth + 1):
                self.add_module(f"dense{i}", torch.nn.Linear(sizes[i - 1], sizes[i], bias=bias))
                if norm:
                    self.add_module(f"norm{i}", torch.nn.BatchNorm1d(sizes[i]))
            self.head = torch.nn.Linear(sizes[-2], sizes[-1])

        def forward(self, x):
            x = x.flatten(1)
            for i in range(1, self.depth + 1):
                x = self.get_submodule(f"dense{i}")(x)
                if not norm:
                    x = torch.tanh(x)
                elif order == "convention":
                    x = torch.tanh(self.get_submodule(f"norm{i}")(x))
                else:
                    x = self.get_submodule(f"norm{i}")(torch.tanh(x))
            return {"logits": self.head(x), "features": x}

    torch.manual_seed(0)
    return MLP()


@pytest.mark.parametrize(
    ("norm", "order", "bias"),
    [(None, "convention", True), ("batch_norm", "convention", False), ("batch_norm", "swap", True)],
)
def test_mlp_agrees_with_torch_and_has_a_bias_unless_a_norm_follows_at_once(
    norm, order, bias, assert_agrees_with_torch
):
    network = mlp(3, hidden=(8, 5), norm=norm, order=order, activation="tanh")
    assert_agrees_with_torch(network, torch_mlp((6, 8, 5, 3), norm=norm, order=order, bias=bias), (7, 6))


def test_training_two_steps_agrees_with_torch(torch_variables):
    torch = pytest.importorskip("torch")
    network = mlp(3, hidden=(8,), norm="batch_norm", activation="tanh")
    module = torch_mlp((6, 8, 3), norm=True, bias=False)
    variables = torch_variables(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    rng = np.random.default_rng(0)

    @jax.jit
    def step(variables, x, y):
        def loss(params):
            outputs, updated = network.apply({**variables, "params": params}, x, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], y).mean(), updated

        grads, updated = jax.grad(loss, has_aux=True)(variables["params"])
        return {**updated, "params": jax.tree.map(lambda p, g: p - 0.5 * g, updated["params"], grads)}

    for _ in range(2):
        x, y = rng.normal(1, 2, (9, 6)).astype(np.float32), rng.integers(0, 3, 9)
        variables = step(variables, x, y)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            module(torch.from_numpy(x))["logits"], torch.from_numpy(y)
        ).backward()
        optimizer.step()
    chex.assert_trees_all_close(variables, torch_variables(module), atol=1e-5)


def test_without_hidden_layers_it_is_linear_in_the_flattened_inputs():
    network = mlp(12, hidden=())
    images = np.arange(24, dtype=np.float32).reshape(2, 2, 3, 2)
    variables = network.init(jax.random.key(0), images)
    outputs, _ = network.apply(variables, images, train=False)
    np.testing.assert_array_equal(outputs["features"], images.reshape(2, 12))
    assert set(variables["params"]) == {"head"}


def test_bfloat16_keeps_parameters_statistics_and_outputs_in_float32():
    network = mlp(3, hidden=(8,), norm="batch_norm", dtype="bfloat16")
    exact = mlp(3, hidden=(8,), norm="batch_norm")
    x = np.random.default_rng(0).normal(0, 1, (16, 6)).astype(np.float32)
    variables = jax.jit(network.init)(jax.random.key(0), x)
    outputs, updated = jax.jit(lambda v: network.apply(v, x, train=True))(variables)
    assert {leaf.dtype for leaf in jax.tree.leaves((outputs, updated))} == {jnp.dtype("float32")}
    expected, _ = jax.jit(lambda v: exact.apply(v, x, train=True))(variables)
    chex.assert_trees_all_close(outputs, expected, atol=0.05)
    assert np.any(outputs["logits"] != expected["logits"])


def test_dropout_drops_and_rescales_the_features_of_a_training_batch():
    network = mlp(3, hidden=(1000,), activation="sigmoid", dropout_rate=0.25)
    x = np.ones((2, 6), np.float32)
    apply = jax.jit(network.apply, static_argnames="train")
    variables = jax.jit(network.init)(jax.random.key(0), x)
    kept, _ = apply(variables, x, train=False)
    dropped, _ = apply(variables, x, train=True, key=jax.random.key(1))
    ratio = np.asarray(dropped["features"]) / np.asarray(kept["features"])
    np.testing.assert_allclose(np.unique(ratio.round(4)), [0, 1.3333], atol=1e-4)
    assert abs((ratio == 0).mean() - 0.25) < 0.05


def test_kernel_init_reaches_every_kernel():
    network = mlp(4, hidden=(4,), kernel_init=nn.initializers.ones)
    params = network.init(jax.random.key(0), np.zeros((1, 4)))["params"]
    for layer in ("dense1", "head"):
        assert np.all(params[layer]["kernel"] == 1)
        assert np.all(params[layer]["bias"] != 1)


def test_an_unknown_activation_is_the_users_error():
    with pytest.raises(UserError, match=r"network\.activation"):
        mlp(3, activation="rellu")
