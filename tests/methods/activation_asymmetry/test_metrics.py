import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxlab.core import UserError
from jaxlab.methods.activation_asymmetry import metrics

RNG = np.random.default_rng(0)
# Channels of several kinds: symmetric, skewed, saturated at one bound with rare values at the other, and off
# the bound by less than float32 keeps of raw third moments.
A = np.stack(
    [
        np.tanh(RNG.normal(0, 1, 600)),
        np.tanh(RNG.normal(1, 1, 600)),
        np.where(RNG.uniform(size=600) < 0.95, 1, -1) * np.tanh(RNG.normal(3, 0.3, 600)),
        np.tanh(RNG.normal(5, 0.5, 600)),
    ],
    axis=-1,
).astype(np.float32)
ROWS = A.astype(np.float64)
IMAGES = A.reshape(6, 10, 10, 4)


def test_skewness_is_that_of_scipy_in_float64_where_raw_moments_cancel():
    expected = stats.skew(ROWS, axis=0)
    for a in (A, IMAGES):
        np.testing.assert_allclose(jax.jit(metrics.channel_skewness)(a), expected, rtol=2e-5)
    mean, square, cube = ((A**k).mean(0) for k in (1, 2, 3))
    raw = (cube - 3 * mean * square + 2 * mean**3) / ROWS.std(0) ** 3
    assert abs(raw[3] / expected[3] - 1) > 0.01


def test_skewness_of_an_affine_image_has_the_sign_of_its_slope_and_the_size_of_the_original():
    skewness = jax.jit(metrics.channel_skewness)
    original = skewness(A[:, :3])
    for slope, shift in ((2.0, 0.5), (-0.3, 1.0)):
        image = skewness(np.float32(slope * A[:, :3] + shift))
        np.testing.assert_allclose(image, np.sign(slope) * original, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, -0.99999])
def test_a_constant_channel_has_no_skewness_counts_apart_and_gives_finite_metrics_and_gradients(value):
    a = np.stack([np.full(1001, value, np.float32), np.tanh(RNG.normal(1, 1, 1001)).astype(np.float32)], -1)
    skewness, constant = (jax.jit(f)(a) for f in (metrics.channel_skewness, metrics.is_constant))
    assert skewness[0] == 0
    np.testing.assert_array_equal(constant, [True, False])
    assert metrics.layer_mean(jnp.abs(skewness), ~constant) == jnp.abs(skewness[1])

    def everything(a):
        return jnp.stack(
            [
                metrics.channel_skewness(a),
                metrics.channel_saturation(a, 1.0),
                metrics.histogram_saturation(a, 11, 1.0),
                *metrics.asymmetric_saturation(a, 1.0),
                metrics.mean_asymmetry(a, 1.0),
                metrics.hoyer_sparsity(a),
                metrics.near_zero_fraction(a, 0.25, relative=True),
            ]
        )

    assert np.isfinite(jax.jit(everything)(a)).all()
    assert np.isfinite(jax.jit(jax.grad(lambda a: everything(a).sum()))(a)).all()


def test_the_mean_of_a_layer_whose_channels_are_all_constant_is_zero():
    assert metrics.layer_mean(jnp.ones(3), jnp.zeros(3, bool)) == 0
    assert metrics.layer_mean(jnp.array([1.0, 2.0, 6.0])) == 3
    assert metrics.layer_mean(jnp.array([1.0, jnp.nan, 6.0]), jnp.array([True, False, True])) == 3.5


def histogram_by_its_definition(rows, bins, bound):
    """Σ |mean of the bin's values| · count / Σ count."""
    place = np.clip(np.floor((rows / bound + 1) / 2 * bins), 0, bins - 1)
    return sum(abs(np.where(place == b, rows / bound, 0).sum(0)) for b in range(bins)) / len(rows)


@pytest.mark.parametrize("bins", [1, 3, 5, 11])
def test_histogram_saturation_is_that_of_its_definition(bins):
    expected = histogram_by_its_definition(1.7159 * ROWS, bins, 1.7159)
    measured = metrics.histogram_saturation(np.float32(1.7159) * IMAGES, bins, 1.7159)
    np.testing.assert_allclose(measured, expected, atol=1e-6)


def test_saturation_is_the_mean_size_and_that_of_any_even_number_of_bins():
    expected = abs(ROWS).mean(0)
    np.testing.assert_allclose(metrics.channel_saturation(2 * IMAGES, 2.0), expected, rtol=1e-6)
    np.testing.assert_allclose(histogram_by_its_definition(ROWS, 10, 1.0), expected, rtol=1e-6)
    np.testing.assert_allclose(metrics.histogram_saturation(IMAGES, 10, 1.0), expected, rtol=1e-6)
    uniform = np.linspace(-1, 1, 2001, dtype=np.float32)[:, None]
    np.testing.assert_allclose(metrics.histogram_saturation(uniform, 10, 1.0), 0.5, atol=1e-3)


def test_asymmetric_saturation_tells_the_bounds_apart():
    a = np.array([[1.0, 0.96, -0.95], [0.95, -0.96, -1.0], [-0.5, 0.0, -1.0], [0.9, 0.2, 0.99]], np.float32)
    hi, lo, asymmetric = metrics.asymmetric_saturation(1.7159 * a, 1.7159, tau=0.9499)
    np.testing.assert_allclose(hi, [0.5, 0.25, 0.25])
    np.testing.assert_allclose(lo, [0.0, 0.25, 0.75])
    np.testing.assert_allclose(asymmetric, [0.5, 0.0, 0.5])
    np.testing.assert_allclose(
        metrics.mean_asymmetry(2 * IMAGES, 2.0), abs(ROWS.mean(0)), rtol=1e-4, atol=1e-7
    )


def test_hoyer_sparsity_is_zero_when_flat_and_one_for_a_single_value():
    z = np.zeros((50, 3), np.float32)
    z[:, 1], z[7, 2] = -3, 5
    np.testing.assert_allclose(metrics.hoyer_sparsity(z), [0, 0, 1], atol=1e-6)
    root = np.sqrt(600)
    expected = (root - abs(ROWS).sum(0) / np.sqrt((ROWS**2).sum(0))) / (root - 1)
    np.testing.assert_allclose(metrics.hoyer_sparsity(IMAGES), expected, atol=1e-6)
    with pytest.raises(UserError, match="two values a channel"):
        metrics.hoyer_sparsity(z[:1])


def test_near_zero_is_absolute_or_in_units_of_the_channels_root_mean_square():
    z = np.array([[0.0, 10.0], [0.2, 2.0], [-0.05, -0.1], [1.0, 0.0]], np.float32)
    np.testing.assert_allclose(metrics.near_zero_fraction(z, 0.1), [0.5, 0.25])
    np.testing.assert_allclose(metrics.near_zero_fraction(z, 0.2501, relative=True), [0.5, 0.5])
    np.testing.assert_allclose(metrics.near_zero_fraction(z, jnp.array([0.01, 5.0])), [0.25, 0.75])
    np.testing.assert_array_equal(metrics.near_zero_fraction(np.zeros((3, 1)), 0.1, relative=True), 1)


def test_batches_of_any_size_have_the_moments_of_the_whole():
    @jax.jit
    def in_batches(a):
        moments = metrics.moments_init(4)
        for batch in (a[:1], a[1:7], a[7:400], a[400:]):
            moments = metrics.moments_update(moments, batch)
        return moments, metrics.moments_finalize(moments)

    moments, together = in_batches(A)
    assert moments.count == 600
    np.testing.assert_allclose(together["mean"], ROWS.mean(0), rtol=1e-6)
    np.testing.assert_allclose(together["variance"], ROWS.var(0), rtol=1e-5)
    np.testing.assert_allclose(together["skewness"], stats.skew(ROWS, axis=0), rtol=1e-3)
    assert together["valid"].all()
    empty = metrics.moments_merge(metrics.moments_init(4), metrics.moments_init(4))
    assert not metrics.moments_finalize(empty)["valid"].any()
    assert np.isfinite(metrics.moments_finalize(empty)["skewness"]).all()


def test_moments_of_eight_devices_are_those_of_one():
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    expected = jax.jit(metrics.channel_skewness)(A)
    split = jax.device_put(A, sharding)
    np.testing.assert_allclose(jax.jit(metrics.channel_skewness)(split), expected, rtol=1e-5)
    # By hand, each device its own moments.
    each = jax.pmap(lambda a: metrics.moments_update(metrics.moments_init(4), a))(A.reshape(8, -1, 4))
    merge = jax.jit(metrics.moments_merge)
    moments = functools.reduce(merge, (jax.tree.map(lambda x, i=i: np.asarray(x)[i], each) for i in range(8)))
    finalize = jax.jit(metrics.moments_finalize)
    np.testing.assert_allclose(finalize(moments)["skewness"], expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.channel_saturation(A, 0.0), "bound: expected"),
        (lambda: metrics.histogram_saturation(A, 0, 1.0), "bins: expected"),
        (lambda: metrics.asymmetric_saturation(A, 1.0, tau=0.0), "tau: expected"),
        (lambda: metrics.channel_skewness(A[:0]), "no values"),
    ],
)
def test_what_makes_no_sense_is_the_users_error(call, message):
    with pytest.raises(UserError, match=message):
        call()
