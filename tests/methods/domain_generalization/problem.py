"""Batches of three environments, and networks in PyTorch, in float64, that start with the weights of ours."""

import functools

import jax
import numpy as np
import optax
import pytest

from jaxlab.methods.domain_generalization.erm import erm
from jaxlab.nn.mlp import mlp

ENVIRONMENTS, SIZE, CLASSES, WIDTH, STEPS = 3, 8, 3, 5, 6
KEY, LR = jax.random.key(0), 1e-2


def fixed_variables(shapes):
    """Parameters of these shapes, the same ones every time, without a compiled initialisation."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: jax.device_put(rng.uniform(-0.6, 0.6, x.shape).astype(x.dtype)), shapes)


def fixed(network):
    """A network that starts from `fixed_variables`."""

    def init(key, inputs):
        return fixed_variables(jax.eval_shape(network.init, key, inputs))

    return network._replace(init=init)


NETWORK, ONE_LOGIT = fixed(mlp(CLASSES, hidden=(WIDTH,))), fixed(mlp(1, hidden=(WIDTH,)))
OPTIMIZER = optax.adam(LR)
ERM = erm(NETWORK, OPTIMIZER)


def batches(environments: int = ENVIRONMENTS, classes: int = CLASSES) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    shift = np.arange(environments)[:, None, None, None, None]
    return [
        {
            "image": (rng.normal(size=(environments, SIZE, 2, 2, 1)) + 0.5 * shift).astype(np.float32),
            "label": rng.integers(0, classes, (environments, SIZE)).astype(np.int32),
            "context": rng.integers(0, 2, (environments, SIZE)).astype(np.int32),
        }
        for _ in range(STEPS)
    ]


BATCHES = batches()
BINARY = batches(environments=2, classes=2)


def assert_close(ours, expected, tolerance=1e-5):
    np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance)


def torch_layers(params, requires_grad=True):
    """Our parameters as tensors: {layer: {"kernel": ..., "bias": ...}}."""
    torch = pytest.importorskip("torch")
    return jax.tree.map(
        lambda leaf: torch.tensor(np.asarray(leaf), dtype=torch.float64, requires_grad=requires_grad), params
    )


def torch_mlp(layers, x):
    """Logits and features of one hidden layer."""
    features = (x.flatten(1) @ layers["dense1"]["kernel"] + layers["dense1"]["bias"]).relu()
    return features @ layers["head"]["kernel"] + layers["head"]["bias"], features


def torch_batch(batch):
    """Images of float64, and integers, one tensor for each environment."""
    torch = pytest.importorskip("torch")
    images = [torch.tensor(np.asarray(x), dtype=torch.float64) for x in batch["image"]]
    return images, [torch.tensor(np.asarray(y)).long() for y in batch["label"]]


def assert_params(params, layers):
    jax.tree.map(lambda ours, tensor: assert_close(ours, tensor.detach().numpy()), params, layers)


def assert_follows(method, torch_loss, trajectory=BATCHES, reset_at=None):
    """A method's updates, compiled once, are those of torch's Adam on a loss.

    `torch_loss(step, logits, features, labels, layers) -> (loss, metrics)`: of lists, one tensor for each
    environment. With `reset_at` there is a new Adam before that step. Where a batch of the trajectory is a
    pair, torch sees the second one.
    """
    torch = pytest.importorskip("torch")
    pairs = [batch if isinstance(batch, tuple) else (batch, batch) for batch in trajectory]
    state, update = method.init(KEY, pairs[0][0]), jax.jit(method.update)
    layers = torch_layers(state.variables["params"])
    tensors = jax.tree.leaves(layers)
    optimizer = torch.optim.Adam(tensors, lr=LR)
    for step, (batch, of_torch) in enumerate(pairs):
        if step == reset_at:
            optimizer = torch.optim.Adam(tensors, lr=LR)
        images, labels = torch_batch(of_torch)
        logits, features = zip(*[torch_mlp(layers, x) for x in images])
        loss, expected = torch_loss(step, logits, features, labels, layers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state, metrics = update(state, batch, jax.random.fold_in(KEY, step))
        for name, value in {"loss": loss, **expected}.items():
            assert_close(metrics[name], value.detach().numpy())
        assert_params(state.variables["params"], layers)
    assert update._cache_size() == 1
    return state


@functools.cache
def _with_jacobian(function, arguments):
    jacobian = jax.jacrev(function, argnums=tuple(range(arguments)))
    return jax.jit(lambda *x: (function(*x), jacobian(*x)))


def assert_gradients(function, torch_function, *arrays):
    """The scalars {name: value} of all arguments, and their gradients, agree in float64."""
    torch = pytest.importorskip("torch")
    arrays = [np.asarray(array, np.float64) for array in arrays]
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    expected = torch_function(*tensors)
    with jax.enable_x64(True):
        values, gradients = jax.device_get(_with_jacobian(function, len(arrays))(*arrays))
    assert set(values) == set(expected)
    for name, value in expected.items():
        assert values[name].dtype == np.float64
        np.testing.assert_allclose(values[name], value.detach(), rtol=1e-10, atol=1e-13)
        of_torch = torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
        for ours, theirs in zip(gradients[name], of_torch):
            theirs = np.zeros(ours.shape) if theirs is None else theirs
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    return values, gradients
