"""Comparison with PyTorch modules whose submodules have the names of our parameters."""

import chex
import jax
import numpy as np
import pytest


def _variables(module):
    """The variables of our network that has the weights and running statistics of a PyTorch module."""
    torch = pytest.importorskip("torch")
    params, batch_stats = {}, {}
    for name, layer in module.named_modules():
        leaves, stats = {}, {}
        if isinstance(layer, torch.nn.Linear):
            leaves["kernel"] = layer.weight.T
        elif isinstance(layer, torch.nn.Conv2d):
            leaves["kernel"] = layer.weight.permute(2, 3, 1, 0)
        elif isinstance(layer, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            leaves["scale"] = layer.weight
            stats = {"mean": layer.running_mean, "var": layer.running_var}
        elif isinstance(layer, torch.nn.GroupNorm):
            leaves["scale"] = layer.weight
        if not leaves:
            continue
        if layer.bias is not None:
            leaves["bias"] = layer.bias
        for tree, values in ((params, leaves), (batch_stats, stats)):
            if values:
                *parents, last = name.split(".")
                for parent in parents:
                    tree = tree.setdefault(parent, {})
                tree[last] = {key: value.detach().numpy().copy() for key, value in values.items()}
    return {"params": params, **({"batch_stats": batch_stats} if batch_stats else {})}


@pytest.fixture
def torch_variables():
    """`torch_variables(module) -> variables`."""
    return _variables


@pytest.fixture
def assert_agrees_with_torch():
    """`assert_agrees_with_torch(network, module, shape)`: outputs in both modes, and running statistics.

    The module takes and returns what the network does, but for its channels, which come first.
    """
    torch = pytest.importorskip("torch")

    def check(network, module, shape, key=None):
        generator = torch.Generator().manual_seed(0)
        for layer in module.modules():
            if isinstance(layer, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                for tensor in (layer.weight.data, layer.running_var):
                    tensor.uniform_(0.5, 1.5, generator=generator)
                for tensor in (layer.bias.data, layer.running_mean):
                    tensor.normal_(0, 0.3, generator=generator)
        rng = np.random.default_rng(0)
        batches = rng.normal(0.5, 2.0, (3, *shape)).astype(np.float32)
        variables = _variables(module)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            variables, jax.eval_shape(network.init, jax.random.key(0), batches[0])
        )

        apply = jax.jit(network.apply, static_argnames="train")
        for batch, train in zip(batches, (True, True, False)):
            outputs, variables = apply(variables, batch, train=train, key=key)
            module.train(train)
            with torch.no_grad():
                expected = module(torch.from_numpy(np.moveaxis(batch, -1, 1)))
            chex.assert_trees_all_close(
                dict(outputs), {name: value.numpy() for name, value in expected.items()}, rtol=1e-4, atol=1e-4
            )
            chex.assert_trees_all_close(variables, _variables(module), rtol=1e-4, atol=1e-5)

    return check
