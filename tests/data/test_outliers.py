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
