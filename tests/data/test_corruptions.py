"""References are in NumPy's float64 or Python's numbers, from the recipe, mostly a pixel at a time."""

import colorsys
import io
import logging
import math
import types
import warnings

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from jaxlab.core import UserError, build
from jaxlab.data import corruptions
from jaxlab.data.coloring import make_bias_attributes

SHEET = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    "jpeg": (80, 65, 58, 50, 40),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "elastic": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "spatter": (
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
}
LEVELS = range(1, 6)
PHOTOGRAPHS = [np.random.default_rng(i).integers(0, 256, (33 + i, 40, 3), dtype=np.uint8) for i in range(3)]
# The corruptions as they are when photographs are at hand.
CORRUPT = dict(
    corruptions.CORRUPTIONS, frost=lambda image, level, rng: corruptions.frost(image, level, rng, PHOTOGRAPHS)
)
DRAW_NOTHING = {
    *("original", "gaussian_blur", "defocus_blur", "zoom_blur"),
    *("brightness", "contrast", "saturate", "jpeg", "pixelate"),
}


def crop(top, left, side):
    view = load_sample_image("china.jpg")[top : top + side, left : left + side]
    return np.asarray(Image.fromarray(view).resize((32, 32), Image.Resampling.LANCZOS))


PAGODA = crop(0, 0, 420)
NATURAL = [PAGODA, crop(100, 200, 256), crop(150, 50, 128), crop(200, 300, 64)]


def rng(level=0):
    return np.random.default_rng([7, level])


def assert_truncated(image, reference, tolerance=1e-3):
    """`image` is `reference`, floats on the scale of 0..255, clipped and truncated; rounding is forgiven."""
    assert image.dtype == np.uint8
    assert image.shape == np.shape(reference)
    cut_off = np.clip(reference, 0, 255) - image
    assert cut_off.min() >= -tolerance
    assert cut_off.max() < 1 + tolerance


# --- References of the parts that several corruptions share ---


def gaussian_weights(std, radius):
    weights = np.array([math.exp(-(i**2) / (2 * std**2)) for i in range(-radius, radius + 1)])
    return weights / weights.sum()


def convolve(image, weights, mode):
    """Along rows and columns with the same weights; `mode` is `np.pad`'s."""
    radius = len(weights) // 2
    for axis in (0, 1):
        padded = np.pad(image, [(radius, radius) if a == axis else (0, 0) for a in range(image.ndim)], mode)
        image = sum(w * np.take(padded, np.arange(32) + i, axis) for i, w in enumerate(weights))
    return image


def blur(image, std, mode="edge", truncate=4):
    return convolve(image, gaussian_weights(std, int(truncate * std + 0.5)), mode) if std else image


def ray_blur(image, radius, std, angle):
    weights = [math.exp(-(i**2) / (2 * std**2)) for i in range(2 * radius + 1)]
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    blurred = np.zeros(image.shape)
    for y, x in np.ndindex(32, 32):
        for i, weight in enumerate(weights):
            row, column = y + math.ceil(i * sin - 0.5), x + math.ceil(i * cos - 0.5)
            blurred[y, x] += weight * image[min(max(row, 0), 31), min(max(column, 0), 31)]
    return np.floor(np.round(257 * blurred / sum(weights)) / 257)


def zoom(image, factor):
    middle = math.ceil(32 / factor)
    size, top = round(middle * factor), (32 - middle) // 2
    cut = (size - 32) // 2 + np.arange(32)
    at = top + cut * (middle - 1) / (size - 1)
    for axis in (0, 1):
        image = np.apply_along_axis(lambda line: np.interp(at, np.arange(32), line), axis, image)
    return image


# --- The values of each corruption ---


def test_the_constants_are_the_sheets():
    assert corruptions.LEVELS == SHEET


@pytest.mark.parametrize("level", LEVELS)
def test_gaussian_noise_is_the_recipes(level):
    noise = rng(level).normal(0, SHEET["gaussian_noise"][level - 1], (32, 32, 3))
    assert_truncated(corruptions.gaussian_noise(PAGODA, level, rng(level)), PAGODA + 255 * noise)


@pytest.mark.parametrize("level", LEVELS)
def test_speckle_noise_is_the_recipes(level):
    noise = rng(level).normal(0, SHEET["speckle_noise"][level - 1], (32, 32, 3))
    assert_truncated(corruptions.speckle_noise(PAGODA, level, rng(level)), PAGODA * (1 + noise))


@pytest.mark.parametrize("level", LEVELS)
def test_shot_noise_is_the_recipes(level):
    photons = SHEET["shot_noise"][level - 1]
    counts = rng(level).poisson(PAGODA / 255 * photons)
    assert_truncated(corruptions.shot_noise(PAGODA, level, rng(level)), 255 * counts / photons)


@pytest.mark.parametrize("level", LEVELS)
def test_impulse_noise_replaces_its_share_of_values_by_black_and_white(level):
    amount, gray = SHEET["impulse_noise"][level - 1], np.full((32, 32, 3), 99, np.uint8)
    noisy = np.stack([corruptions.impulse_noise(gray, level, rng(i)) for i in range(40)])
    assert set(np.unique(noisy)) == {0, 99, 255}
    for value in (0, 255):
        np.testing.assert_allclose(
            np.mean(noisy == value), amount / 2, atol=4 * math.sqrt(amount / noisy.size)
        )
    assert (np.ptp(noisy, axis=-1) > 0).any()  # the channels of a pixel apart


@pytest.mark.parametrize("level", LEVELS)
def test_gaussian_blur_is_the_recipes(level):
    blurred = blur(PAGODA.astype(float), SHEET["gaussian_blur"][level - 1])
    assert_truncated(corruptions.gaussian_blur(PAGODA, level, None), blurred)


@pytest.mark.parametrize("level", LEVELS)
def test_defocus_blur_is_the_recipes(level):
    radius, smoothing = SHEET["defocus_blur"][level - 1]
    disk = {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y**2 + x**2 <= radius**2}
    soft = gaussian_weights(smoothing, 1)
    kernel = np.zeros((5, 5))
    for y, x in disk:
        kernel[y + 1 : y + 4, x + 1 : x + 4] += np.outer(soft, soft) / len(disk)
    padded = np.pad(PAGODA.astype(float), [(2, 2), (2, 2), (0, 0)], "reflect")
    blurred = sum(kernel[i, j] * padded[i : i + 32, j : j + 32] for i, j in np.ndindex(5, 5))
    assert_truncated(corruptions.defocus_blur(PAGODA, level, None), blurred)


@pytest.mark.parametrize("level", LEVELS)
def test_glass_blur_copies_neighbors_between_two_blurs(level):
    std, _, repetitions = SHEET["glass_blur"][level - 1]
    draws = rng(level)
    pixels = np.floor(blur(PAGODA.astype(float), std if level > 1 else 0) + 1e-9)
    if level == 1:  # the blur is none, but a division and a multiplication by 255 that truncate
        pixels = np.floor(PAGODA / 255 * 255)
    for _ in range(repetitions):
        dx, dy = draws.integers(-1, 1, (2, 30, 30))
        for y in range(31, 1, -1):
            for x in range(31, 1, -1):
                pixels[y, x] = pixels[y + dy[y - 2, x - 2], x + dx[y - 2, x - 2]]
    assert_truncated(corruptions.glass_blur(PAGODA, level, rng(level)), blur(pixels, std if level > 1 else 0))


@pytest.mark.parametrize("level", LEVELS)
def test_motion_blur_is_the_recipes(level):
    radius, std = SHEET["motion_blur"][level - 1]
    blurred = ray_blur(PAGODA, radius, std, rng(level).uniform(-45, 45))
    np.testing.assert_array_equal(corruptions.motion_blur(PAGODA, level, rng(level)), blurred)


@pytest.mark.parametrize(
    ("radius", "std", "angle", "expected"),
    [
        (6, 1.5, 30, "0,30:67 0,31:151 14,13:3 15,13:14 15,14:44 16,15:85 16,16:107"),
        (
            *(8, 3, -105),
            "0,31:91 1,31:44 16,16:59 17,16:56 18,17:47 19,17:36 20,17:24 21,17:14 22,18:8 23,18:3 24,18:1",
        ),
    ],
)
def test_a_motion_blur_of_two_dots_is_imagemagicks(radius, std, angle, expected):
    """What MagickMotionBlurImage of ImageMagick 6.9.11 (Q16), as `wand` calls it, wrote as PNG."""
    dots = np.zeros((32, 32), np.uint8)
    dots[16, 16], dots[0, 31] = 255, 200
    blurred = corruptions._ray_blur(dots, radius, std, angle)
    found = " ".join(f"{y},{x}:{blurred[y, x]}" for y, x in zip(*np.nonzero(blurred)))
    assert found == expected


@pytest.mark.parametrize(("level", "last"), [(1, 1.06), (2, 1.11), (3, 1.15), (4, 1.20), (5, 1.25)])
def test_zoom_blur_is_the_recipes(level, last):
    factors = np.arange(1, SHEET["zoom_blur"][level - 1], 0.01)
    assert factors[-1] == pytest.approx(last)
    total = PAGODA + sum(zoom(PAGODA.astype(float), factor) for factor in factors)
    assert_truncated(corruptions.zoom_blur(PAGODA, level, None), total / (len(factors) + 1))


@pytest.mark.parametrize("level", LEVELS)
def test_snow_is_the_recipes(level):
    mean, std, factor, threshold, radius, blur_std, weight = SHEET["snow"][level - 1]
    draws = rng(level)
    flakes = zoom(draws.normal(mean, std, (32, 32)), factor)
    flakes = np.floor(255 * np.clip(np.where(flakes < threshold, 0, flakes), 0, 1))
    flakes = ray_blur(flakes, radius, blur_std, draws.uniform(-135, -45))[..., None]
    gray = (PAGODA @ [0.299, 0.587, 0.114])[..., None]
    image = weight * PAGODA + (1 - weight) * np.maximum(PAGODA, 1.5 * gray + 127.5)
    expected = image + flakes + flakes[::-1, ::-1]
    assert flakes.max() > 0
    assert_truncated(corruptions.snow(PAGODA, level, rng(level)), expected)


@pytest.mark.parametrize("level", LEVELS)
def test_frost_adds_a_cut_out_of_a_photograph(level):
    image_weight, frost_weight = SHEET["frost"][level - 1]
    frosted = corruptions.frost(PAGODA, level, rng(level), PHOTOGRAPHS)
    cut_outs = [
        np.floor(np.clip(image_weight * PAGODA + frost_weight * photograph[y : y + 32, x : x + 32], 0, 255))
        for photograph in PHOTOGRAPHS
        for y, x in np.ndindex(len(photograph) - 32, 8)
    ]
    assert sum(np.array_equal(frosted, cut_out) for cut_out in cut_outs) == 1


def test_frost_uses_every_photograph():
    plain = [np.full((40, 40, 3), value, np.uint8) for value in (10, 110, 210)]
    black = np.zeros((32, 32, 3), np.uint8)
    values = {int(corruptions.frost(black, 1, rng(i), plain)[0, 0, 0]) for i in range(30)}
    assert values == {2, 22, 42}


@pytest.mark.parametrize("level", LEVELS)
def test_fog_is_the_recipes(level):
    thickness, decay = SHEET["fog"][level - 1]
    draws, heights, wobble, step = rng(level), np.zeros((32, 32)), 100.0, 32
    while step > 1:
        half = step // 2
        # Centres of squares have diagonal neighbours; then the middles of their sides have straight ones.
        for dy, dx, offsets in (
            (half, half, [(-half, -half), (-half, half), (half, -half), (half, half)]),
            (0, half, [(-half, 0), (half, 0), (0, -half), (0, half)]),
            (half, 0, [(-half, 0), (half, 0), (0, -half), (0, half)]),
        ):
            noise = wobble * draws.uniform(-wobble, wobble, (32 // step, 32 // step))
            for i, j in np.ndindex(noise.shape):
                y, x = i * step + dy, j * step + dx
                near = [heights[(y + b) % 32, (x + a) % 32] for b, a in offsets]
                heights[y, x] = sum(near) / 4 + noise[i, j]
        wobble, step = wobble / decay, half
    plasma = (heights - heights.min()) / np.ptp(heights)
    top = PAGODA.max() / 255
    foggy = (PAGODA + 255 * thickness * plasma[..., None]) * top / (top + thickness)
    assert_truncated(corruptions.fog(PAGODA, level, rng(level)), foggy)


@pytest.mark.parametrize("level", [4, 5])
def test_mud_is_the_recipes(level):
    mean, std, blur_std, threshold, cover_std, _ = SHEET["spatter"][level - 1]
    liquid = blur(rng(level).normal(mean, std, (32, 32)), blur_std)
    cover = blur(1.0 * (liquid > threshold), cover_std)[..., None]
    cover = np.where(cover < 0.8, 0, cover)
    assert 0 < np.mean(cover > 0) < 0.5
    expected = (1 - cover) * PAGODA + cover * [63, 42, 20]
    assert_truncated(corruptions.spatter(PAGODA, level, rng(level)), expected)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_water_adds_turquoise_of_its_strength_where_there_is_liquid(level):
    mean, std, blur_std, threshold, strength, _ = SHEET["spatter"][level - 1]
    liquid = blur(rng(level).normal(mean, std, (32, 32)), blur_std) >= threshold
    dark = np.full((32, 32, 3), 10, np.uint8)
    added = corruptions.spatter(dark, level, rng(level)) - 10.0
    assert (added[~liquid] <= 0).all()
    assert (added[liquid] > 2).any()
    peak = np.array([175, 238, 238]) * strength
    np.testing.assert_allclose(added.max((0, 1)), peak, atol=1)  # somewhere the water is at its full strength
    np.testing.assert_allclose(added[..., 0] / peak[0], added[..., 1] / peak[1], atol=0.02)


def test_spatter_without_a_drop_leaves_the_image():
    dry = types.SimpleNamespace(normal=lambda mean, std, shape: np.zeros(shape))
    for level in LEVELS:
        difference = corruptions.spatter(PAGODA, level, dry) - PAGODA.astype(int)
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("level", LEVELS)
def test_contrast_is_the_recipes(level):
    mean = PAGODA.mean((0, 1))
    expected = mean + SHEET["contrast"][level - 1] * (PAGODA - mean)
    assert_truncated(corruptions.contrast(PAGODA, level, None), expected)


@pytest.mark.parametrize("level", LEVELS)
def test_brightness_and_saturation_are_the_recipes(level):
    summand = SHEET["brightness"][level - 1]
    factor, more = SHEET["saturate"][level - 1]
    brighter, saturated = np.zeros((32, 32, 3)), np.zeros((32, 32, 3))
    for y, x in np.ndindex(32, 32):
        h, s, v = colorsys.rgb_to_hsv(*(PAGODA[y, x] / 255))
        brighter[y, x] = colorsys.hsv_to_rgb(h, s, min(v + summand, 1))
        saturated[y, x] = colorsys.hsv_to_rgb(h, min(factor * s + more, 1), v)
    assert_truncated(corruptions.brightness(PAGODA, level, None), 255 * brighter)
    assert_truncated(corruptions.saturate(PAGODA, level, None), 255 * saturated)


@pytest.mark.parametrize("level", LEVELS)
def test_jpeg_is_what_pillow_decodes(level):
    file = io.BytesIO()
    Image.fromarray(PAGODA).save(file, format="JPEG", quality=SHEET["jpeg"][level - 1])
    compressed = corruptions.jpeg(PAGODA, level, None)
    np.testing.assert_array_equal(compressed, np.asarray(Image.open(file)), strict=True)
    assert (compressed != PAGODA).any()


@pytest.mark.parametrize(("level", "side"), [(1, 30), (2, 28), (3, 27), (4, 24), (5, 20)])
def test_pixelation_averages_boxes(level, side):
    def resize(image, size):
        """A new pixel is the mean of the old ones whose centres lie in it, or at least in a unit around it."""
        scale = len(image) / size
        for axis in (1, 0):  # Pillow rounds in between
            lines = []
            for i in range(size):
                distance = np.abs(
                    np.arange(len(image) if axis == 0 else image.shape[1]) + 0.5 - scale * (i + 0.5)
                )
                lines.append(np.compress(distance <= max(scale, 1) / 2, image, axis).mean(axis))
            image = np.floor(np.stack(lines, axis) + 0.5)
        return image

    expected = resize(resize(PAGODA.astype(float), side), 32)
    assert np.abs(corruptions.pixelate(PAGODA, level, None) - expected).max() <= 1


@pytest.mark.parametrize("level", LEVELS)
def test_elastic_is_the_recipes(level):
    size, smoothness, reach = (32 * c for c in SHEET["elastic"][level - 1])
    draws = rng(level)
    corners = np.array([[26, 26], [26, 6], [6, 6]], float)
    moved = corners + draws.uniform(-reach, reach, (3, 2))
    dx, dy = (
        size * blur(draws.uniform(-1, 1, (32, 32)), smoothness, "symmetric", truncate=3) for _ in range(2)
    )

    def sample(image, y, x, mode):
        """Linear interpolation; `mode` of `np.pad` says what is around the image."""
        padded = np.pad(image, [(40, 40), (40, 40), (0, 0)], mode)
        top, left = np.floor(y).astype(int), np.floor(x).astype(int)
        v, u = (y - top)[..., None], (x - left)[..., None]
        top, left = top + 40, left + 40
        upper = (1 - u) * padded[top, left] + u * padded[top, left + 1]
        lower = (1 - u) * padded[top + 1, left] + u * padded[top + 1, left + 1]
        return (1 - v) * upper + v * lower

    ones = np.ones((3, 1))
    back = np.linalg.solve(np.hstack([moved, ones]), corners)  # from a point of the result to its source
    y, x = np.mgrid[:32, :32]
    source = np.stack([x, y, np.ones((32, 32))], -1) @ back
    warped = sample(PAGODA.astype(float), source[..., 1], source[..., 0], "reflect")
    expected = sample(warped, y + dy, x + dx, "symmetric")
    assert_truncated(corruptions.elastic(PAGODA, level, rng(level)), expected, tolerance=0.02)


# --- What holds for all ---


@pytest.mark.parametrize("name", CORRUPT)
def test_draws_come_from_the_generator_alone(name):
    before, image = np.random.get_state()[1].copy(), PAGODA.copy()  # noqa: NPY002
    for level in LEVELS:
        first, again, other = (CORRUPT[name](image, level, rng(seed)) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert np.array_equal(first, other) == (name in DRAW_NOTHING)
        assert (first.dtype, first.shape) == (np.uint8, (32, 32, 3))
    np.testing.assert_array_equal(image, PAGODA)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize("name", CORRUPT)
@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_images_raise_no_warnings(name, value):
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        for level in LEVELS:
            CORRUPT[name](np.full((32, 32, 3), value, np.uint8), level, rng())


@pytest.mark.parametrize(
    "name",
    [
        *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "gaussian_blur", "defocus_blur"),
        *("zoom_blur", "snow", "fog", "brightness", "contrast", "jpeg", "pixelate"),
    ],
)
def test_a_higher_level_is_farther_from_the_clean_image(name):
    distance = [
        np.mean([
            (CORRUPT[name](image, level, rng(seed)).astype(float) - image) ** 2
            for image in NATURAL
            for seed in range(4)
        ])
        for level in LEVELS
    ]  # fmt: skip
    assert distance[0] > 0
    assert (np.diff(distance) > 0).all()


@pytest.mark.parametrize("name", [name for name in CORRUPT if name != "original"])
@pytest.mark.parametrize(
    ("image", "level", "message"),
    [
        (PAGODA, 0, "level is 0"),
        (PAGODA, 6, "level is 6; it must be 1, 2, 3, 4 or 5"),
        (PAGODA[:28, :28], 1, r"an image is uint8 \(28, 28, 3\)"),
        (PAGODA[..., :1], 1, r"uint8 \(32, 32, 1\)"),
        (PAGODA / 255, 1, "an image is float64"),
    ],
)  # fmt: skip
def test_a_bad_level_or_image_is_named(name, image, level, message):
    with pytest.raises(UserError, match=f"corruptions.{name}: .*{message}"):
        CORRUPT[name](image, level, rng())


# --- Families and the data set ---


def test_the_families_are_those_of_the_papers():
    assert {family: " ".join(names) for family, names in corruptions.FAMILIES.items()} == {
        "type0": "snow frost fog brightness contrast spatter elastic jpeg pixelate saturate",
        "type1": "gaussian_noise shot_noise impulse_noise speckle_noise gaussian_blur defocus_blur glass_blur"
        " motion_blur zoom_blur original",
        "disentangled": "brightness contrast gaussian_noise frost elastic gaussian_blur defocus_blur"
        " impulse_noise saturate pixelate",
    }
    for names in corruptions.FAMILIES.values():
        assert len(set(names)) == 10
    assert set(corruptions.CORRUPTIONS) == {*SHEET, "original"}


COUNT = 40
DATASET = {
    "image": np.stack(NATURAL)[np.arange(COUNT) % 4],
    "label": np.random.default_rng(0).permutation(np.arange(COUNT) % 10).astype(np.int64),
}
FEW = ("gaussian_noise", "contrast", "original")
FEW_DATASET = {"image": DATASET["image"], "label": DATASET["label"] % 3}


@pytest.fixture
def frost_dir(tmp_path):
    """Six photographs, each of one colour, and a file that is none; the sixth is not to be used."""
    for i in range(6):
        Image.new("RGB", (200, 170 + 10 * i), (40 * i, 100, 200)).save(
            tmp_path / f"frost{i + 1}.{'png' if i < 3 else 'jpg'}"
        )
    (tmp_path / "LICENSE").write_text("none")
    return str(tmp_path)


@pytest.mark.parametrize("severity", [1, 4])
@pytest.mark.parametrize("family", corruptions.FAMILIES)
def test_every_image_is_its_attributes_corruption_at_the_level_above_the_severity(
    family, severity, frost_dir
):
    corrupted = corruptions.corrupted_images(
        DATASET, corruptions=family, aligned_ratio=0.5, severity=severity, seed=3, frost_dir=frost_dir
    )
    attribute = make_bias_attributes(DATASET["label"], 0.5, 10)
    assert set(corrupted) == {"image", "label", "attribute"}
    np.testing.assert_array_equal(corrupted["attribute"], attribute, strict=True)
    np.testing.assert_array_equal(corrupted["label"], DATASET["label"].astype(np.int32), strict=True)
    photographs = corruptions.read_frost(frost_dir)
    for n, a in enumerate(attribute.tolist()):
        name = corruptions.FAMILIES[family][a]
        extra = (photographs,) if name == "frost" else ()
        draws = np.random.default_rng([3, n, a])
        expected = corruptions.CORRUPTIONS[name](DATASET["image"][n], severity + 1, draws, *extra)
        np.testing.assert_array_equal(corrupted["image"][n], expected, strict=True)


def test_variants_hold_every_corruption_and_the_image_is_the_attributes():
    def corrupted(**changed):
        return corruptions.corrupted_images(FEW_DATASET, corruptions=FEW, aligned_ratio=0.6, **changed)

    plain, kept = corrupted(), corrupted(keep_variants=True)
    assert (kept["variants"].shape, kept["variants"].dtype) == ((COUNT, 3, 32, 32, 3), np.uint8)
    for column in plain:
        np.testing.assert_array_equal(plain[column], kept[column], strict=True)
    np.testing.assert_array_equal(kept["variants"][np.arange(COUNT), kept["attribute"]], kept["image"])
    np.testing.assert_array_equal(kept["variants"][:, 2], FEW_DATASET["image"])
    for n in range(COUNT):
        np.testing.assert_array_equal(
            kept["variants"][n, 1], corruptions.contrast(FEW_DATASET["image"][n], 5, None)
        )


def test_the_seed_decides_the_draws_and_no_image_has_anothers():
    gray = {"image": np.full((6, 32, 32, 3), 128, np.uint8), "label": np.arange(6) % 2}

    def corrupted(seed):
        names = ("gaussian_noise", "speckle_noise")
        return corruptions.corrupted_images(
            gray, corruptions=names, aligned_ratio=1, seed=seed, keep_variants=True
        )["variants"]

    noise = corrupted(1)
    np.testing.assert_array_equal(noise, corrupted(1))
    assert (noise != corrupted(2)).any((2, 3, 4)).all()
    assert len({variant.tobytes() for variant in noise.reshape(12, -1)}) == 12
    # Neither the number of images nor their corruption matters to the draws of one.
    gray = {"image": gray["image"][:2], "label": gray["label"][:2]}
    np.testing.assert_array_equal(noise[:2], corrupted(1))


def test_a_balanced_set_has_every_corruption_equally_often_in_every_class():
    dataset = {"image": DATASET["image"][:36], "label": np.arange(36) % 3}
    corrupted = corruptions.corrupted_images(dataset, corruptions=FEW, aligned_ratio=0.99, balanced=True)
    table = np.zeros((3, 3), int)
    np.add.at(table, (corrupted["label"], corrupted["attribute"]), 1)
    assert (table == 4).all()


def test_without_photographs_frost_is_skipped_with_one_warning(caplog):
    with caplog.at_level(logging.WARNING):
        corrupted = corruptions.corrupted_images(DATASET, aligned_ratio=1)
    frosted = corrupted["attribute"] == corruptions.FAMILIES["type0"].index("frost")
    assert frosted.sum() == 4
    np.testing.assert_array_equal(corrupted["image"][frosted], DATASET["image"][frosted])
    assert (corrupted["image"] != DATASET["image"]).any((1, 2, 3))[~frosted].all()
    (record,) = caplog.records
    assert "frost" in record.message
    assert "set frost_dir" in record.message


def test_nothing_is_said_where_frost_is_not_asked_for(caplog):
    with caplog.at_level(logging.WARNING):
        corruptions.corrupted_images(FEW_DATASET, corruptions=FEW, aligned_ratio=1)
    assert not caplog.records


def test_photographs_are_the_first_five_in_rgb_shrunk_to_a_fifth(frost_dir):
    photographs = corruptions.read_frost(frost_dir)
    assert [photograph.shape for photograph in photographs] == [(34 + 2 * i, 40, 3) for i in range(5)]
    for i, photograph in enumerate(photographs):
        np.testing.assert_allclose(photograph, np.broadcast_to([40 * i, 100, 200], photograph.shape), atol=2)


def test_a_folder_without_usable_photographs_is_named(tmp_path):
    def corrupted(folder):
        names = ("frost", "fog", "jpeg")
        return corruptions.corrupted_images(
            FEW_DATASET, corruptions=names, aligned_ratio=1, frost_dir=str(folder)
        )

    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=f"{folder}: no images; frost_dir must hold photographs"):
            corrupted(folder)
    small = tmp_path / "small.png"
    Image.new("RGB", (500, 160)).save(small)
    with pytest.raises(UserError, match=f"{small}: 500 × 160 pixels; .* more than 160 × 160"):
        corrupted(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="broken.jpg: broken image; replace or remove it"):
        corrupted(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(corruptions="typ0"), "no family 'typ0'. Did you mean 'type0'"),
        (dict(corruptions=("snow", "fogg")), "no corruption 'fogg'. Did you mean 'fog'"),
        (dict(corruptions=("fog", "jpeg")), "2 corruptions for labels up to 9; give one for each class"),
        (dict(severity=0), "severity is 0; it must be 1, 2, 3 or 4"),
        (dict(severity=5), "severity is 5"),
        (dict(aligned_ratio=95), "aligned_ratio is 95"),
        (
            dict(dataset={**DATASET, "image": DATASET["image"][:, :28, :28]}),
            r"an image is uint8 \(28, 28, 3\)",
        ),
    ],
)
def test_bad_input_is_named(changed, message):
    with pytest.raises(UserError, match=message) as error:
        corruptions.corrupted_images(
            **{"dataset": DATASET, "corruptions": "type1", "aligned_ratio": 0.95, **changed}
        )
    assert "\n" not in str(error.value)


def test_a_config_finds_the_builder(data_dir):
    digits = dict(name="store.arrays", dataset="digits", split="test")
    section = dict(name="corruptions.corrupted_images", dataset=digits, aligned_ratio=0.99)
    with pytest.raises(UserError, match=r"an image is uint8 \(8, 8, 1\)"):
        build("data", section, data_dir=data_dir)
