import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.nn import from_linen
from jaxlab.nn.normalization import BatchNorm

INPUTS = np.linspace(-1, 1, 20, dtype=np.float32).reshape(4, 5)


class Tiny(nn.Module):
    norm: bool = False
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs, *, train):
        # Both layers have one shape, so that their initialisation is compiled once.
        dense = functools.partial(nn.Dense, 5, dtype=self.dtype, kernel_init=nn.initializers.uniform(1.0))
        x = dense()(inputs)
        if self.norm:
            x = BatchNorm()(x, train=train)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return {"logits": dense()(x), "features": x}


def test_training_returns_new_batch_statistics_and_leaves_the_old_ones():
    network = from_linen(Tiny(norm=True))
    variables = network.init(jax.random.key(0), INPUTS)
    before = jax.tree.map(np.asarray, variables)
    _, updated = network.apply(variables, INPUTS, train=True)
    chex.assert_trees_all_equal_structs(updated, variables)
    chex.assert_trees_all_equal(variables, before)
    chex.assert_trees_all_equal(updated["params"], variables["params"])
    old, new = variables["batch_stats"]["BatchNorm_0"], updated["batch_stats"]["BatchNorm_0"]
    assert np.all(old["mean"] != new["mean"])
    assert np.all(old["var"] != new["var"])


@pytest.mark.parametrize(("norm", "train"), [(False, True), (False, False), (True, False)])
def test_variables_come_back_as_the_same_object_when_nothing_is_updated(norm, train):
    network = from_linen(Tiny(norm=norm))
    variables = network.init(jax.random.key(0), INPUTS)
    assert network.apply(variables, INPUTS, train=train)[1] is variables


def test_variables_are_plain_dicts():
    network = from_linen(Tiny(norm=True))
    variables = network.init(jax.random.key(0), INPUTS)
    assert type(variables) is type(variables["params"]) is type(variables["batch_stats"]) is dict
    assert type(network.apply(variables, INPUTS, train=True)[1]) is dict


def test_dropout_is_a_function_of_the_key_in_training_and_absent_in_evaluation():
    network = from_linen(Tiny(dropout_rate=0.5))
    variables = network.init(jax.random.key(0), INPUTS)
    logits = [
        network.apply(variables, INPUTS, train=train, key=jax.random.key(seed))[0]["logits"]
        for train, seed in ((True, 1), (True, 1), (True, 2), (False, 1), (False, 2))
    ]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.any(logits[0] != logits[2])
    np.testing.assert_array_equal(logits[3], logits[4])


def test_dropout_in_training_without_a_key_says_what_is_missing():
    network = from_linen(Tiny(dropout_rate=0.5))
    variables = network.init(jax.random.key(0), INPUTS)
    network.apply(variables, INPUTS, train=False)
    with pytest.raises(ValueError, match=r"Tiny draws random numbers.*needs `key`"):
        network.apply(variables, INPUTS, train=True)


def test_logits_are_float32_when_the_module_computes_in_bfloat16():
    network = from_linen(Tiny(dtype=jnp.bfloat16))
    variables = network.init(jax.random.key(0), INPUTS)
    outputs, _ = network.apply(variables, INPUTS, train=False)
    assert outputs["logits"].dtype == jnp.float32
    assert outputs["features"].dtype == jnp.bfloat16


def test_a_vmap_over_variables_and_keys_equals_a_loop():
    network = from_linen(Tiny(norm=True, dropout_rate=0.5))
    variables = network.init(jax.random.key(0), INPUTS)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), variables)
    keys = jax.random.split(jax.random.key(1), 2)
    apply = jax.jit(lambda variables, key: network.apply(variables, INPUTS, train=True, key=key))
    together = jax.vmap(apply)(stacked, keys)
    for i in range(2):
        alone = apply(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), keys[i])
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone, atol=1e-5)


def test_init_has_the_same_shapes_for_each_of_several_keys():
    network = from_linen(Tiny(norm=True))
    one = jax.eval_shape(network.init, jax.random.key(0), INPUTS)
    many = jax.eval_shape(jax.vmap(network.init, (0, None)), jax.random.split(jax.random.key(0), 3), INPUTS)
    chex.assert_trees_all_equal_shapes(many, jax.tree.map(lambda leaf: np.zeros((3, *leaf.shape)), one))
