import jax
import numpy as np
import pytest

from jaxlab.core import build
from jaxlab.nn.activations import LearnableShift
from jaxlab.nn.mlp import mlp
from jaxlab.nn.weight_decay import weight_decay_mask


@pytest.mark.parametrize(
    ("norm", "bias", "decayed"),
    [
        (False, False, {"kernel", "scale", "norm_bias", "bias", "shift"}),
        (True, False, {"kernel", "bias", "shift"}),
        (False, True, {"kernel", "scale"}),
        (True, True, {"kernel"}),
    ],
)
def test_what_decays_through_a_configs_optimizer(norm, bias, decayed):
    network = mlp(2, hidden=(3,), norm="batch_norm", order="swap", activation=LearnableShift("tanh", 1.0))
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.ones((1, 2)))["params"]
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    mask = weight_decay_mask(params, exclude_norm=norm, exclude_bias=bias)
    spared = dict(name="jaxlab.nn.weight_decay:spare", norm=norm, bias=bias)
    optimizer = build("optimizer", dict(name="add_decayed_weights", weight_decay=0.5, mask=spared))
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    expected = {
        "dense1": {"kernel": "kernel", "bias": "bias"},
        "norm1": {"scale": "scale", "bias": "norm_bias", "shift": {"shift": "shift"}},
        "head": {"kernel": "kernel", "bias": "bias"},
    }
    assert mask == jax.tree.map(lambda kind: kind in decayed, expected)
    jax.tree.map(
        lambda kind, update: np.testing.assert_array_equal(update, 0.5 * (kind in decayed)), expected, updates
    )
