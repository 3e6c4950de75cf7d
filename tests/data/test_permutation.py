import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxlab.data.permutation import permuted_index


@pytest.mark.parametrize("size", [1, 2, 3, 64, 597, 60_000])
def test_it_is_a_bijection_of_every_size(size):
    order = permuted_index(jax.random.key(0), jnp.arange(size), size)
    assert order.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_it_stays_in_range_near_the_largest_size():
    size = 2**31 - 1
    position = jnp.array([0, 1, 2**30, size - 1], jnp.int32)
    index = np.asarray(permuted_index(jax.random.key(0), position, size))
    assert len(set(index.tolist())) == 4
    assert index.min() >= 0


def test_all_permutations_of_four_are_equally_likely():
    keys = jax.random.split(jax.random.key(0), 24_000)
    orders = jax.jit(jax.vmap(lambda key: permuted_index(key, jnp.arange(4), 4)))(keys)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_single_positions_and_pairs_are_uniform():
    size, position = 30, jnp.array([7, 8])
    keys = jax.random.split(jax.random.key(0), 60_000)
    values = jax.jit(jax.vmap(lambda key: permuted_index(key, position, size)))(keys)
    first, second = np.asarray(values).T
    assert stats.chisquare(np.bincount(first, minlength=size)).pvalue > 1e-3
    pairs = np.bincount(first * size + second, minlength=size**2).reshape(size, size)
    assert np.trace(pairs) == 0
    assert stats.chisquare(pairs[~np.eye(size, dtype=bool)]).pvalue > 1e-3


def test_it_is_the_same_under_jit_and_vmap_and_another_for_another_key():
    keys, position = jax.random.split(jax.random.key(1)), jnp.arange(100)
    eager = permuted_index(keys[0], position, 100)
    vmapped = jax.jit(jax.vmap(lambda key: permuted_index(key, position, 100)))(keys)
    np.testing.assert_array_equal(vmapped[0], eager)
    assert (vmapped[0] != vmapped[1]).any()
