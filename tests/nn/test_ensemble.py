import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.nn.ensemble import ensemble
from jaxlab.nn.mlp import mlp


@pytest.fixture
def inputs():
    return jax.random.normal(jax.random.key(1), (6, 2, 2, 1))


def test_members_are_networks_of_their_own(inputs):
    member = mlp(3, hidden=(4,), norm="batch_norm")
    network = ensemble(member, size=2)
    variables = network.init(jax.random.key(0), inputs)
    outputs, updated = network.apply(variables, inputs, train=True)
    for i in range(2):
        one, one_updated = jax.tree.map(operator.itemgetter(i), (variables, updated))
        own, own_updated = member.apply(one, inputs, train=True)
        np.testing.assert_allclose(outputs["member_logits"][:, i], own["logits"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(outputs["features"].reshape(6, 2, 4)[:, i], own["features"], atol=1e-6)
        chex.assert_trees_all_close(one_updated, own_updated, atol=1e-6)
    assert np.abs(outputs["member_logits"][:, 0] - outputs["member_logits"][:, 1]).max() > 0.01


def test_logits_are_those_of_the_mean_probability(inputs):
    network = ensemble(mlp(3, hidden=()), size=4)
    outputs, _ = network.apply(network.init(jax.random.key(0), inputs), inputs, train=False)
    mean = jax.nn.softmax(outputs["member_logits"]).mean(1)
    np.testing.assert_allclose(jax.nn.softmax(outputs["logits"]), mean, rtol=1e-5)


def test_dropout_differs_between_members(inputs):
    network = ensemble(mlp(3, hidden=(64,), dropout_rate=0.5), size=2)
    variables = network.init(jax.random.key(0), inputs)
    same = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), variables)
    outputs, _ = network.apply(same, inputs, train=True, key=jax.random.key(2))
    assert np.abs(outputs["member_logits"][:, 0] - outputs["member_logits"][:, 1]).max() > 0.01
