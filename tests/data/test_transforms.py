import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.data import transforms

IMAGE = np.random.default_rng(0).integers(1, 256, (64, 6, 5, 3), dtype=np.uint8)
BATCH = {"image": IMAGE, "label": np.arange(64, dtype=np.int32)}


def test_standardize_is_its_formula_and_keeps_the_rest():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    out = jax.jit(transforms.standardize(mean=mean, std=std))(BATCH, None)
    assert out["image"].dtype == jnp.float32
    np.testing.assert_allclose(
        out["image"], (IMAGE.astype(np.float64) / 255 - mean) / np.array(std), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_array_equal(out["label"], BATCH["label"])


def test_random_crop_shifts_each_image_within_its_zero_border():
    crop = transforms.random_crop(padding=1)
    out = np.asarray(jax.jit(crop)(BATCH, jax.random.key(0))["image"])
    assert out.shape == IMAGE.shape
    assert out.dtype == np.uint8
    padded = np.pad(IMAGE, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [
        next((y, x) for y in range(3) for x in range(3) if (padded[i, y : y + 6, x : x + 5] == out[i]).all())
        for i in range(len(out))
    ]
    assert set(shifts) == {(y, x) for y in range(3) for x in range(3)}


def test_random_flip_mirrors_about_half_of_the_images():
    out = np.asarray(transforms.random_flip()(BATCH, jax.random.key(0))["image"])
    flipped = (out == IMAGE[:, :, ::-1]).all((1, 2, 3))
    kept = (out == IMAGE).all((1, 2, 3))
    assert (flipped ^ kept).all()
    assert 16 < flipped.sum() < 48


def test_each_transform_of_a_chain_has_its_own_key():
    seen = []

    def spy(batch, key):
        seen.append(tuple(jax.random.key_data(key).tolist()))
        return batch

    transforms.apply(BATCH, jax.random.key(0), (spy, spy))
    assert len(set(seen)) == 2


@pytest.mark.parametrize("size", [3, 9])
def test_resize_is_that_of_torch_with_antialiasing(size):
    torch = pytest.importorskip("torch")
    images = torch.tensor(IMAGE[:4]).double().permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
    out = jax.jit(transforms.resize(size=size))(BATCH, None)
    assert out["image"].dtype == jnp.float32
    np.testing.assert_allclose(out["image"][:4], expected.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(out["label"], BATCH["label"])


def test_a_resized_crop_is_a_part_within_the_image_of_the_size_and_shape_asked_for():
    # The pixels of these images tell where they are, so that a crop tells where it is from.
    height, width, count, size = 20, 14, 300, 64
    y, x = np.indices((height, width))
    images = np.broadcast_to(np.stack([y, x], -1), (count, height, width, 2)).astype(np.float32)
    crop = transforms.random_resized_crop(size=size, scale=(0.3, 0.8), ratio=(0.5, 2.0))
    out = np.asarray(jax.jit(crop)({"image": images}, jax.random.key(0))["image"], np.float64)
    assert out.shape == (count, size, size, 2)
    middle = slice(8, size - 8)  # beyond its last pixels an image has no slope
    part, corner = [], []
    for values in (out[:, :, 0, 0], out[:, 0, :, 1]):
        step = np.diff(values[:, middle])
        np.testing.assert_allclose(step, np.broadcast_to(step[:, :1], step.shape), atol=1e-3)
        part.append(size * step.mean(1))
        corner.append(values[:, middle].mean(1) - part[-1] / 2 + 0.5)
    (high, wide), (top, left) = part, corner
    for begin, extent, whole in ((top, high, height), (left, wide, width)):
        assert begin.min() > -0.02
        assert np.max(begin + extent) < whole + 0.02
        free = whole - extent > 2  # the place is uniform where there is room
        place = begin[free] / (whole - extent[free])
        assert place.min() < 0.1
        assert place.max() > 0.9
        np.testing.assert_allclose(place.mean(), 0.5, atol=0.1)
    whole = (high < height - 0.02) & (wide < width - 0.02)  # where nothing was cut
    assert 0.5 < whole.mean() < 1
    area, ratio = (high * wide)[whole] / (height * width), (wide / high)[whole]
    assert np.all((area > 0.299) & (area < 0.801))
    assert np.all((ratio > 0.499) & (ratio < 2.001))
    assert np.ptp(area) > 0.4
    assert ratio.min() < 0.6
    assert np.all((high * wide)[~whole] / (height * width) < 0.801)


def test_the_crop_of_a_whole_square_is_a_resize():
    batch = {"image": IMAGE[:, :5]}
    crop = transforms.random_resized_crop(size=3, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    cropped, resized = jax.jit(lambda key: (crop(batch, key), transforms.resize(size=3)(batch, None)))(
        jax.random.key(0)
    )
    np.testing.assert_allclose(cropped["image"], resized["image"], rtol=1e-4, atol=1e-3)


def _jitter_by_hand(image, brightness, contrast, saturation, shift):
    """Torchvision's formulas on one float image in [0, 1], and hue by Python's own conversion."""

    def gray(image):
        return (image @ [0.299, 0.587, 0.114])[..., None]

    image = np.clip(brightness * image, 0, 1)
    image = np.clip(contrast * image + (1 - contrast) * gray(image).mean(), 0, 1)
    image = np.clip(saturation * image + (1 - saturation) * gray(image), 0, 1)

    def turn(pixel):
        hue, s, v = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb((hue + shift) % 1, s, v)

    return np.apply_along_axis(turn, -1, image)


@pytest.mark.parametrize("maximum", [255.0, 1.0])
def test_color_jitter_is_its_formulas(maximum):
    corners = np.array([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)])
    images = IMAGE[:20].copy()
    images[0, :4, :2] = corners.reshape(4, 2, 3)  # black, white and pure colours
    images[1] = images[1, ..., :1]  # grey
    amounts = {"brightness": 0.4, "contrast": 0.3, "saturation": 0.8, "hue": 0.5}
    jitter = transforms.color_jitter(**amounts, maximum=maximum)
    key = jax.random.key(3)
    scaled = images * np.float32(maximum / 255)
    out = jax.jit(jitter)({"image": scaled, "label": 0}, key)
    assert out["image"].dtype == jnp.float32
    draws = [
        np.asarray(jax.random.uniform(k, (20, 1, 1, 1), minval=1 - amount, maxval=1 + amount)).ravel()
        for k, amount in zip(jax.random.split(key, 4), amounts.values())
    ]
    for ours, image, *factors, hue in zip(out["image"], images, *draws):
        expected = _jitter_by_hand(image / 255, *factors, hue - 1)
        np.testing.assert_allclose(ours / maximum, expected, atol=1e-5)
    assert all(np.ptp(factors) > 0.4 for factors in draws)
    assert np.ptp(out["image"][1], axis=-1).max() < 1e-4 * maximum  # grey stays grey


def test_color_jitter_without_amounts_changes_nothing():
    out = jax.jit(transforms.color_jitter())(BATCH, jax.random.key(0))
    np.testing.assert_allclose(out["image"], IMAGE, atol=1e-3)


def test_random_grayscale_takes_the_colour_of_some_images_wholly():
    out = jax.jit(transforms.random_grayscale(probability=0.3))(BATCH, jax.random.key(0))["image"]
    assert out.shape == IMAGE.shape
    expected = np.broadcast_to((IMAGE @ np.array([0.299, 0.587, 0.114]))[..., None], IMAGE.shape)
    kept = np.abs(out - IMAGE).max((1, 2, 3)) < 1e-6
    np.testing.assert_allclose(out[~kept], expected[~kept], rtol=1e-5)
    assert 8 < np.sum(~kept) < 32
    for probability in (0.0, 1.0):
        out = transforms.random_grayscale(probability=probability)(BATCH, jax.random.key(0))["image"]
        np.testing.assert_allclose(out, expected if probability else IMAGE, rtol=1e-5)
