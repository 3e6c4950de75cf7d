import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.data import outliers

IMAGE = np.random.default_rng(0).permutation(40 * 4 * 6 * 2).reshape(40, 4, 6, 2).astype(np.int32)
BYTES = {"image": np.random.default_rng(0).integers(0, 17, (40, 4, 4, 1), dtype=np.uint8)}


def test_uniform_noise_fills_the_range_in_the_sources_dtype():
    noise = outliers.uniform_noise(BYTES, count=500, maximum=16, seed=1)["image"]
    assert noise.shape == (500, 4, 4, 1)
    assert noise.dtype == np.uint8
    np.testing.assert_allclose(np.bincount(noise.ravel()) / noise.size, 1 / 17, atol=0.015)
    source = {"image": BYTES["image"].astype(np.float32)}
    noise = outliers.uniform_noise(source, count=500, maximum=2.0)["image"]
    assert noise.dtype == np.float32
    assert 0 <= noise.min() < 0.01
    assert 1.99 < noise.max() <= 2
    np.testing.assert_allclose(noise.mean(), 1, atol=0.05)


def test_gaussian_noise_is_in_range_around_its_middle():
    noise = outliers.gaussian_noise(BYTES, count=500, maximum=16)["image"]
    assert noise.shape == (500, 4, 4, 1)
    assert noise.min() == 0
    assert noise.max() == 16
    np.testing.assert_allclose([noise.mean(), noise.std()], [8, 4], atol=0.2)


def test_mirrored_turns_columns_around():
    np.testing.assert_array_equal(outliers.mirrored({"image": IMAGE})["image"], np.flip(IMAGE, axis=2))


def test_jigsaw_moves_whole_quadrants_and_never_none():
    shuffled = outliers.jigsaw({"image": IMAGE})["image"]

    def quadrants(image):
        return [image[y : y + 2, x : x + 3].tobytes() for y in (0, 2) for x in (0, 3)]

    for before, after in zip(IMAGE, shuffled):
        assert sorted(quadrants(before)) == sorted(quadrants(after))
        assert quadrants(before) != quadrants(after)
    with pytest.raises(UserError, match="quadrants"):
        outliers.jigsaw({"image": IMAGE[:, :3]})


def test_inverted_is_its_own_inverse_and_knows_its_range():
    inverted = outliers.inverted(BYTES, maximum=16)
    np.testing.assert_array_equal(inverted["image"], 16 - BYTES["image"].astype(int))
    assert inverted["image"].dtype == np.uint8
    np.testing.assert_array_equal(outliers.inverted(inverted, maximum=16)["image"], BYTES["image"])
    with pytest.raises(UserError, match="maximum 15"):
        outliers.inverted(BYTES, maximum=15)


def test_transposed_flipped_is_a_quarter_turn_clockwise():
    turned = outliers.transposed_flipped({"image": IMAGE})["image"]
    np.testing.assert_array_equal(turned, np.rot90(IMAGE, k=-1, axes=(1, 2)))


def test_pixel_permutation_keeps_each_images_pixels_and_is_fresh_for_each():
    permuted = outliers.pixel_permutation({"image": IMAGE}, count=80)["image"]
    for i, image in enumerate(permuted):
        before = {tuple(pixel) for pixel in IMAGE[i % 40].reshape(-1, 2).tolist()}
        assert {tuple(pixel) for pixel in image.reshape(-1, 2).tolist()} == before
    assert (permuted[:40] != permuted[40:]).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize(
    "build",
    [
        lambda seed: outliers.uniform_noise(BYTES, count=9, maximum=16, seed=seed),
        lambda seed: outliers.jigsaw(BYTES, seed=seed),
        lambda seed: outliers.pixel_permutation(BYTES, count=9, seed=seed),
    ],
    ids=["uniform_noise", "jigsaw", "pixel_permutation"],
)
def test_the_seed_decides(build):
    np.testing.assert_array_equal(build(3)["image"], build(3)["image"])
    assert (build(3)["image"] != build(4)["image"]).any()


RGB = {"image": np.random.default_rng(1).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)}


def test_means_of_two_images_are_of_two_different_ones():
    few = {"image": np.uint8([1, 4, 16])[:, None, None, None]}
    arithmetic = outliers.arithmetic_mean(few, count=200)["image"].ravel()
    geometric = outliers.geometric_mean(few, count=200)["image"].ravel()
    assert set(arithmetic) == {2.5, 8.5, 10.0}
    assert set(geometric) == {2.0, 4.0, 8.0}
    with pytest.raises(UserError, match="two"):
        outliers.arithmetic_mean({"image": few["image"][:1]}, count=2)


def test_the_official_jigsaw_pixel_by_pixel():
    # Of a 4 × 4 image the quadrants are a, b above c, d, and the halves that are exchanged single lines.
    image = np.arange(16).reshape(1, 4, 4, 1)
    expected = [[4, 5, 8, 9], [0, 1, 12, 13], [10, 11, 3, 2], [14, 15, 7, 6]]
    np.testing.assert_array_equal(outliers.quadrant_jigsaw({"image": image})["image"][0, ..., 0], expected)
    with pytest.raises(UserError, match="multiples of 4"):
        outliers.quadrant_jigsaw({"image": IMAGE})


def test_speckle_scales_pixels_and_leaves_black_black():
    gray = {"image": np.float32([0, 100, 255])[:, None, None, None] * np.ones((1, 50, 50, 1), np.float32)}
    black, middle, white = outliers.speckle(gray, maximum=255)["image"]
    assert (black == 0).all()
    np.testing.assert_allclose(np.median(middle), 100, atol=5)
    assert white.min() == 0
    assert white.max() == 255


def test_pixelate_shows_means_of_boxes():
    pixelated = outliers.pixelate(RGB, size=4)["image"]
    boxes = RGB["image"].reshape(12, 4, 2, 4, 2, 3).mean((2, 4))
    np.testing.assert_allclose(pixelated, boxes.repeat(2, 1).repeat(2, 2), atol=1.01)  # rounded twice
    gray = {"image": RGB["image"][..., :1]}
    np.testing.assert_array_equal(outliers.pixelate(gray, size=4)["image"], pixelated[..., :1])


def test_channels_are_exchanged_and_inverted():
    red, green, blue = np.moveaxis(RGB["image"], -1, 0)
    ghost = outliers.rgb_ghost(RGB)["image"]
    np.testing.assert_array_equal(ghost, np.stack([green[:, :, ::-1], blue, red], -1))
    inverted = outliers.partly_inverted(RGB, maximum=255)["image"]
    np.testing.assert_array_equal(inverted, np.stack([red, 255 - green, 255 - blue], -1))
    for outlier in (outliers.rgb_ghost, lambda x: outliers.partly_inverted(x, maximum=16)):
        with pytest.raises(UserError, match="RGB"):
            outlier(BYTES)


def test_made_outliers_are_in_range_and_repeat_with_their_seed():
    for make in (outliers.smooth_noise, outliers.soft_strokes):
        image = make(count=40, size=14, maximum=255, seed=3)["image"]
        assert image.shape == (40, 14, 14, 1)
        assert image.dtype == np.float32
        assert image.min() >= 0
        assert 200 < image.max() <= 255
        np.testing.assert_array_equal(image, make(count=40, size=14, maximum=255, seed=3)["image"])
    noise = outliers.smooth_noise(count=40, size=14, maximum=1, seed=3)["image"]
    assert all(set(np.unique(image)) == {0, 1} for image in noise[::2])
    np.testing.assert_allclose(noise[::2].mean(), 0.3, atol=0.01)
    both = outliers.concatenated((BYTES, {"image": BYTES["image"][:3]}))["image"]
    assert len(both) == 43
