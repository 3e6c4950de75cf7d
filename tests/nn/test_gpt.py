"""That the whole equals GPT-2 is shown in tests/methods/in_context/test_model.py, on official names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.nn.gpt import GPT, causal_attention, rotate

tiny = functools.partial(GPT, n_embd=8, n_layer=1, n_head=2)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def shapes_of(module, x):
    return jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), x)


def random_variables(module, x):
    """Variables far from where they start, for which nothing is compiled."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: np.float32(rng.normal(0, 0.4, p.shape)), shapes_of(module, x))


@functools.partial(jax.jit, static_argnums=0)
def apply(module, variables, x):
    return module.apply(variables, x, train=False)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.01)])
def test_attention_and_its_gradient_equal_jax_own(dtype, tolerance):
    q, k, v, g = (normal(i, 2, 5, 3, 4).astype(dtype) for i in range(4))

    @functools.partial(jax.jit, static_argnums=0)
    def run(attention, *inputs):
        value, pull_back = jax.vjp(attention, *inputs)
        return value, *pull_back(g)

    library = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    for ours, theirs in zip(run(causal_attention, 9 * q, k, v), run(library, 9 * q, k, v)):
        assert ours.dtype == theirs.dtype == dtype
        ours, theirs = np.float32(ours), np.float32(theirs)
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def test_rotation_keeps_lengths_and_its_products_depend_on_distances_only():
    q, k = (jnp.tile(normal(i, 1, 1, 1, 8), (1, 9, 1, 1)) for i in range(2))
    np.testing.assert_allclose(np.linalg.norm(rotate(q), axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-5)
    products = np.einsum("bthd,bshd->ts", rotate(q), rotate(k))
    for distance in range(-8, 9):
        np.testing.assert_allclose(np.ptp(np.diagonal(products, distance)), 0, atol=1e-5)
    assert np.std(products[0]) > 0.1
    first = jnp.zeros((1, 2, 1, 8)).at[..., 0].set(1.0)  # turned by one radian at position 1
    np.testing.assert_allclose(rotate(first)[0, 1, 0, [0, 4]], [np.cos(1), np.sin(1)], atol=1e-6)


@pytest.mark.parametrize("positions", ["learned", "rotary", "none"])
def test_without_positions_the_order_of_earlier_tokens_has_no_effect(positions):
    module, x = tiny(max_length=6, positions=positions), normal(0, 1, 5, 8)
    variables = random_variables(module, x)
    assert ("wpe" in variables["params"]) == (positions == "learned")
    outputs = apply(module, variables, x)
    swapped = apply(module, variables, x[:, np.array([1, 0, 2, 3, 4])])
    assert (np.abs(outputs - swapped)[:, -1].max() < 1e-5) == (positions == "none")


def test_a_sequence_may_be_of_any_length_unless_its_positions_are_learned():
    x = jnp.zeros((1, 7, 8))
    for positions in ("rotary", "none"):
        shapes_of(tiny(max_length=6, positions=positions), x)
    with pytest.raises(UserError, match="7 tokens, but 6 learned positions"):
        shapes_of(tiny(max_length=6), x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_head=3), "3 heads do not divide n_embd=8"),
        (dict(n_head=8, positions="rotary"), "even, not 1"),
        (dict(), "None learned positions"),
    ],
)
def test_sizes_that_do_not_fit_are_told(changes, message):
    with pytest.raises(UserError, match=message):
        shapes_of(tiny(**changes), jnp.zeros((1, 2, 8)))


def test_initial_statistics_are_those_of_gpt2():
    module = GPT(n_embd=64, n_layer=8, n_head=2, max_length=200)

    @jax.jit  # only the leaves that are returned are compiled
    def init(key):
        params = module.init(key, jnp.zeros((1, 2, 64)), train=False)["params"]
        return params["wpe"], params["h_7"]

    wpe, block = init(jax.random.key(0))
    np.testing.assert_allclose(np.std(wpe), 0.02, rtol=0.05)
    for branch, name in (("attn", "c_attn"), ("mlp", "c_fc")):
        first, last = block[branch][name], block[branch]["c_proj"]
        np.testing.assert_allclose(np.std(first["kernel"]), 0.02, rtol=0.05)
        np.testing.assert_allclose(np.std(last["kernel"]), 0.02 / np.sqrt(2 * 8), rtol=0.05)
        assert not np.any(first["bias"])
        assert not np.any(last["bias"])
    for name in ("ln_1", "ln_2"):
        assert np.all(block[name]["scale"] == 1)
        assert not np.any(block[name]["bias"])


def test_dropout_is_for_training_alone():
    module, x = tiny(positions="none", dropout=0.5), normal(0, 1, 3, 8)
    variables = random_variables(module, x)

    @jax.jit
    def train(key):
        return module.apply(variables, x, train=True, rngs={"dropout": key})

    first, again, second = (train(jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 0.1
    exact = apply(tiny(positions="none"), variables, x)
    np.testing.assert_allclose(apply(module, variables, x), exact, atol=1e-6)


def test_bfloat16_keeps_parameters_and_output_in_float32_and_is_near_it():
    module, x = tiny(max_length=4, dtype=jnp.bfloat16), normal(0, 2, 4, 8)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(module, x))} == {jnp.dtype("float32")}
    variables = random_variables(module, x)
    outputs, exact = apply(module, variables, x), apply(tiny(max_length=4), variables, x)
    assert outputs.dtype == jnp.float32
    assert 0 < np.abs(outputs - exact).max() < 0.03


def test_without_mlp_a_block_has_one_branch():
    params = shapes_of(tiny(positions="none", mlp=False), jnp.zeros((1, 2, 8)))["params"]
    assert set(params["h_0"]) == {"ln_1", "attn"}
