"""The filter gradients that are exchanged in a program are those of XLA's own convolutions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core

from jaxlab.train.filter_gradients import with_fast_filter_gradients
from jaxlab.train.program import _equations

CONV = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))


def exchange(function, *example):
    """`function` with its filter gradients exchanged, compiled, and whether any was."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*example)
    jaxpr = with_fast_filter_gradients(closed.jaxpr)
    run = jax.jit(jax_core.jaxpr_as_fun(jax_core.ClosedJaxpr(jaxpr, closed.consts)))

    def exchanged(*args):
        return jax.tree.unflatten(jax.tree.structure(shape), run(*jax.tree.leaves(args)))

    return exchanged, convolutions(jaxpr) < convolutions(closed.jaxpr)


def convolutions(jaxpr):
    return sum(equation.primitive.name == "conv_general_dilated" for equation in _equations(jaxpr))


def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), dtype)


def assert_same(function, *example):
    exchanged, found = exchange(function, *example)
    assert found
    for actual, expected in zip(jax.tree.leaves(exchanged(*example)), jax.tree.leaves(function(*example))):
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * scale)


PADDINGS = ["SAME", "VALID", [(1, 1), (1, 1)], [(0, 2), (3, 1)]]


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        *itertools.product([(1, 1), (2, 3), (3, 3)], [1, 2], PADDINGS),
        ((5, 5), 3, "SAME"),
        ((3, 3), (1, 2), "SAME"),
        ((3, 3), 1, [(-1, 2), (1, -2)]),
    ],
    ids=str,
)
def test_the_gradient_is_that_of_the_convolution(kernel, stride, padding):
    strides = (stride, stride) if isinstance(stride, int) else stride

    def loss(image, weight):
        return jnp.sum(jax.lax.conv_general_dilated(image, weight, strides, padding, **CONV) ** 2)

    assert_same(jax.grad(loss, argnums=(0, 1)), draw(6, 9, 8, 4), draw(*kernel, 4, 5))


@pytest.mark.parametrize(("batch", "size"), [(1, 70), (7, 70), (12, 32), (8, 3)])
def test_the_batch_is_taken_in_equal_parts_however_large(batch, size):
    def loss(weight, image):
        return jnp.sum(jax.lax.conv(image.transpose(0, 3, 1, 2), weight, (1, 1), "SAME"))

    def channels_last(weight, image):
        return jnp.sum(jax.lax.conv_general_dilated(image, weight, (1, 1), "SAME", **CONV) ** 2)

    assert_same(jax.grad(channels_last), draw(3, 3, 2, 3), draw(batch, size, size, 2))
    _, found = exchange(jax.grad(loss), draw(3, 2, 3, 3), draw(2, 5, 5, 2))
    assert not found  # channels first: left to XLA


def test_gradients_inside_of_loops_and_branches_are_exchanged_too():
    image, weight = draw(4, 6, 6, 2), draw(3, 3, 2, 2)

    @jax.jit
    def gradient(weight):
        def loss(weight):
            return jnp.sum(jax.lax.conv_general_dilated(image, weight, (1, 1), "SAME", **CONV) ** 2)

        return jax.grad(loss)(weight)

    def train(weight):
        weight, _ = jax.lax.scan(lambda w, _: (w - 1e-3 * gradient(w), None), weight, None, length=3)
        return jax.lax.cond(weight.sum() > 0, gradient, lambda w: -gradient(w), weight)

    assert_same(train, weight)


def test_a_program_without_any_is_the_same_object():
    def function(x):
        return jax.lax.cond(x.sum() > 0, jax.jit(jnp.sin), jnp.cos, jax.lax.map(jnp.tanh, x))

    jaxpr = jax.make_jaxpr(function)(draw(3)).jaxpr
    assert with_fast_filter_gradients(jaxpr) is jaxpr


def test_second_derivatives_are_the_same():
    image, weight = draw(2, 5, 5, 2), draw(3, 3, 2, 2)

    def penalty(weight):
        def loss(weight):
            return jnp.sum(jnp.tanh(jax.lax.conv_general_dilated(image, weight, (1, 1), "SAME", **CONV)))

        return jnp.sum(jax.grad(loss)(weight) ** 2)

    assert_same(jax.grad(penalty), weight)


@pytest.mark.parametrize(
    "options",
    [dict(feature_group_count=2), dict(rhs_dilation=(2, 2)), dict(lhs_dilation=(2, 2))],
    ids=str,
)
def test_other_convolutions_are_left_to_xla(options):
    groups, padding = options.get("feature_group_count", 1), [(2, 2), (2, 2)]

    def loss(weight, image):
        return jnp.sum(jax.lax.conv_general_dilated(image, weight, (1, 1), padding, **CONV, **options))

    _, found = exchange(jax.grad(loss), draw(3, 3, 4 // groups, 6), draw(2, 8, 8, 4))
    assert not found


def test_other_dtypes_are_left_to_xla():
    def loss(weight, image):
        return jnp.sum(jax.lax.conv_general_dilated(image, weight, (1, 1), "SAME", **CONV))

    half = jnp.bfloat16
    _, found = exchange(jax.grad(loss), draw(3, 3, 4, 6, dtype=half), draw(2, 8, 8, 4, dtype=half))
    assert not found
