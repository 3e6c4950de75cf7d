import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError, build
from jaxlab.data import coloring, store

SEVERITIES = (0.05, 0.02, 0.01, 0.005, 0.002)
RNG = np.random.default_rng(0)
GREY = {
    "image": RNG.integers(0, 256, (300, 4, 6, 1), dtype=np.uint8),
    "label": RNG.integers(0, 10, 300).astype(np.int64),
}


def reference_attributes(labels, aligned_ratio, num_attrs):
    """The recipe, an example at a time, in Python's numbers (whose `round` is half to even too)."""
    attributes, seen = [], [0] * num_attrs
    for label in labels.tolist():
        size, cumulative = labels.tolist().count(label), 0.0
        for attribute in range(num_attrs):
            cumulative += aligned_ratio if attribute == label else (1 - aligned_ratio) / (num_attrs - 1)
            if round(size * cumulative) > seen[label]:
                break
        attributes.append(attribute)
        seen[label] += 1
    return attributes


def reference_colorize(gray, attr, noise, std, mean_color):
    """The recipe, a pixel at a time, each operation rounded to float32."""
    images = np.zeros((*gray.shape, 3), np.uint8)
    for n, y, x, channel in np.ndindex(images.shape):
        color = np.float32(mean_color[attr[n], channel]) + np.float32(std) * noise[n, channel]
        color = min(max(color, np.float32(0)), np.float32(1))
        images[n, y, x, channel] = int(color * np.float32(gray[n, y, x]))
    return images


def counts(labels, attributes):
    table = np.zeros((10, 10), int)
    np.add.at(table, (labels, attributes), 1)
    return table


@pytest.mark.parametrize("aligned_ratio", [0, 0.1, 0.5, 0.95, 0.98, 0.99, 0.995, 1])
@pytest.mark.parametrize("num_attrs", [2, 10])
def test_attributes_are_the_recipes(aligned_ratio, num_attrs):
    labels = np.random.default_rng(1).integers(0, num_attrs, 700)
    attributes = coloring.make_bias_attributes(labels, aligned_ratio, num_attrs)
    assert attributes.dtype == np.int32
    assert attributes.tolist() == reference_attributes(labels, aligned_ratio, num_attrs)


@pytest.mark.parametrize(("aligned_ratio", "each_other"), [(0.99, 1), (0.95, 5), (0.1, 90)])
def test_every_class_has_the_exact_number_of_each_attribute(aligned_ratio, each_other):
    labels = RNG.permutation(np.repeat(np.arange(10), 900))
    table = counts(labels, coloring.make_bias_attributes(labels, aligned_ratio, 10))
    expected = np.full((10, 10), each_other)
    np.fill_diagonal(expected, 900 - 9 * each_other)
    np.testing.assert_array_equal(table, expected)


@pytest.mark.parametrize(("aligned_ratio", "conflicting"), [(0.99, 600), (0.95, 3000)])
def test_mnists_class_sizes_give_the_nominal_share_of_conflicting_examples(aligned_ratio, conflicting):
    sizes = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    labels = np.repeat(np.arange(10), sizes)
    table = counts(labels, coloring.make_bias_attributes(labels, aligned_ratio, 10))
    nominal = np.float64(sizes) * (1 - aligned_ratio)
    np.testing.assert_allclose(np.sum(table, axis=1) - np.diag(table), nominal, atol=1)
    assert abs(np.sum(table) - np.trace(table) - conflicting) <= 3


def test_attributes_ascend_within_a_class_whatever_lies_between():
    labels = RNG.integers(0, 10, 500)
    attributes = coloring.make_bias_attributes(labels, 0.6, 10)
    for label in range(10):
        members = labels == label
        assert (np.diff(attributes[members]) >= 0).all()
        alone = coloring.make_bias_attributes(labels[members], 0.6, 10)
        np.testing.assert_array_equal(attributes[members], alone)


@pytest.mark.parametrize("std", [0, *SEVERITIES, 1.0])
def test_colors_are_the_recipes(std):
    gray, attr = GREY["image"][:40, ..., 0], np.arange(40) % 10
    noise = RNG.standard_normal((40, 3), dtype=np.float32)
    images = coloring.colorize(gray, attr, noise, std, coloring.MEAN_COLOR)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(
        images, reference_colorize(gray, attr, noise, std, coloring.MEAN_COLOR), strict=True
    )


def test_pixels_are_truncated_and_colors_clipped():
    mean_color = np.float32([[0.5, 0.9, 0.1]])
    noise = np.float32([[0, 1, -1]])
    image = coloring.colorize(np.uint8([[[0, 3, 255]]]), np.array([0]), noise, 0.5, mean_color)
    assert image.tolist() == [[[[0, 0, 0], [1, 3, 0], [127, 255, 0]]]]


def test_colorize_can_be_traced():
    gray, attr = GREY["image"][..., 0], GREY["label"].astype(np.int32)
    noise = RNG.standard_normal((300, 3), dtype=np.float32)
    eager = coloring.colorize(gray, attr, noise, 0.05, coloring.MEAN_COLOR)
    traced = jax.jit(coloring.colorize)(gray, attr, noise, 0.05, jnp.asarray(coloring.MEAN_COLOR))
    assert traced.dtype == jnp.uint8
    difference = np.abs(np.int32(traced) - eager)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("std", SEVERITIES)
def test_the_severity_is_the_spread_of_a_color(std):
    white = {"image": np.full((2000, 1, 1, 1), 255, np.uint8), "label": np.full(2000, 5)}
    color = coloring.colored_digits(white, aligned_ratio=1, std=std)["image"][:, 0, 0, [0, 2]] / 255
    # Colour 5, without the channel that is clipped; 255 levels add the variance of a uniform error.
    np.testing.assert_allclose(color.std(axis=0), np.hypot(std, 1 / 255 / np.sqrt(12)), rtol=0.08)
    np.testing.assert_allclose(color.mean(axis=0) + 0.5 / 255, [0.32139337, 0.44644988], atol=5e-3)


def test_colored_digits_put_the_parts_together():
    colored = coloring.colored_digits(GREY, aligned_ratio=0.7, std=0.02, seed=3)
    attribute = coloring.make_bias_attributes(GREY["label"], 0.7, 10)
    noise = np.random.default_rng(3).standard_normal((300, 3), dtype=np.float32)
    gray = GREY["image"][..., 0]
    image = coloring.colorize(gray, attribute, noise, 0.02, coloring.MEAN_COLOR)
    assert set(colored) == {"image", "label", "attribute"}
    np.testing.assert_array_equal(colored["image"], image, strict=True)
    np.testing.assert_array_equal(colored["attribute"], attribute, strict=True)
    np.testing.assert_array_equal(colored["label"], GREY["label"].astype(np.int32), strict=True)


def test_the_seed_decides_the_noise_and_nothing_else():
    def colored(seed):
        return coloring.colored_digits(GREY, aligned_ratio=0.9, std=0.05, seed=seed)

    first, other = colored(1), colored(2)
    np.testing.assert_array_equal(first["image"], colored(1)["image"])
    assert (first["image"] != other["image"]).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(first["attribute"], other["attribute"])


def test_a_balanced_set_has_every_color_equally_often_in_every_class():
    label = RNG.permutation(np.repeat(np.arange(10), np.arange(50, 150, 10)))
    dataset = {"image": np.zeros((len(label), 1, 1, 1), np.uint8), "label": label}
    colored = coloring.colored_digits(dataset, aligned_ratio=0.99, std=0.01, balanced=True)
    table = counts(colored["label"], colored["attribute"])
    np.testing.assert_array_equal(table, np.tile(np.arange(5, 15)[:, None], 10))


def test_pooling_averages_squares_before_coloring():
    pooled = np.zeros((300, 2, 3), np.uint8)
    for y, x in np.ndindex(2, 3):
        square = GREY["image"][:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2, 0].astype(int)
        pooled[:, y, x] = np.rint(square.sum(axis=(1, 2)) / 4)
    small = {"image": pooled[..., None], "label": GREY["label"]}
    np.testing.assert_array_equal(
        coloring.colored_digits(GREY, aligned_ratio=0.9, std=0.01, pool=2)["image"],
        coloring.colored_digits(small, aligned_ratio=0.9, std=0.01)["image"],
    )


def test_the_embedded_digits_are_colored_from_a_config(data_dir):
    digits = dict(name="store.arrays", dataset="digits", split="train")
    section = dict(
        name="coloring.colored_digits",
        dataset=digits,
        aligned_ratio=0.95,
        std=0.005,
        maximum=16,
        pool=2,
    )
    stream = build("data", dict(name="streams.resident", dataset=section), batch_size=32, data_dir=data_dir)
    batch = jax.eval_shape(stream.batch, 0, jax.random.key(0))
    assert (batch["image"].shape, batch["image"].dtype) == ((32, 4, 4, 3), jnp.uint8)

    digits = store.arrays("digits", "train", data_dir)
    colored = coloring.colored_digits(digits, aligned_ratio=0.95, std=0, maximum=16)
    gray = np.rint(digits["image"] * (255 / 16)).astype(np.uint8)
    np.testing.assert_array_equal(
        colored["image"], np.uint8(gray * coloring.MEAN_COLOR[colored["attribute"]][:, None, None])
    )
    np.testing.assert_allclose(np.mean(colored["attribute"] == colored["label"]), 0.95, atol=0.01)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(aligned_ratio=95), "aligned_ratio is 95"),
        (dict(aligned_ratio=float("nan")), "aligned_ratio is nan"),
        (dict(pool=3), "pool is 3; it must divide 4 × 6"),
        (dict(maximum=16), "maximum is 16, but pixels are in 0..255"),
        (dict(dataset={**GREY, "label": GREY["label"] + 1}), "above every label"),
        (dict(dataset={**GREY, "image": GREY["image"].repeat(3, axis=3)}), "3 channels"),
    ],
)
def test_bad_input_is_named(changed, message):
    with pytest.raises(UserError, match=message):
        coloring.colored_digits(**{"dataset": GREY, "aligned_ratio": 0.95, "std": 0.01, **changed})
