import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from jaxlab.core import UserError
from jaxlab.methods.domain_generalization.digit_domains import in_context, rotated

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
DATA = {"image": IMAGE, "label": np.arange(3)}


@pytest.mark.parametrize("degrees", [0.0, 15.0, 75.0])
def test_rotation_is_that_of_pil(degrees):
    data = rotated(DATA, degrees=degrees)
    assert data["image"].shape == IMAGE.shape
    assert data["image"].dtype == np.uint8
    assert data["label"] is DATA["label"]
    for ours, image in zip(data["image"], IMAGE):
        expected = Image.fromarray(image[..., 0], mode="L").rotate(degrees, resample=Image.BILINEAR)
        np.testing.assert_array_equal(ours[..., 0], np.asarray(expected))


def test_a_right_angle_is_counter_clockwise_and_exact():
    data = rotated(DATA, degrees=90.0)
    np.testing.assert_array_equal(data["image"], np.rot90(IMAGE, axes=(1, 2)))


def test_an_oblique_rotation_interpolates_between_four_pixels_about_the_centre():
    smooth = gaussian_filter(RNG.normal(size=(28, 28)), 3)
    smooth = 255 * (smooth - smooth.min()) / np.ptp(smooth)
    image = np.rint(smooth).astype(np.uint8)
    ours = rotated({"image": image[None, ..., None]}, degrees=30.0)["image"][0, ..., 0]
    angle, rows, columns = np.deg2rad(30), *np.indices((28, 28))
    # Where a pixel of the result comes from; rows count downwards.
    x, y = columns - 13.5, rows - 13.5
    from_x = 13.5 + np.cos(angle) * x - np.sin(angle) * y
    from_y = 13.5 + np.sin(angle) * x + np.cos(angle) * y
    left, top = np.floor(from_x).astype(int), np.floor(from_y).astype(int)
    inside = (left >= 0) & (left < 27) & (top >= 0) & (top < 27)
    left, top, fx, fy = (v[inside] for v in (left, top, from_x - left, from_y - top))
    source = np.float64(image)
    upper = (1 - fx) * source[top, left] + fx * source[top, left + 1]
    lower = (1 - fx) * source[top + 1, left] + fx * source[top + 1, left + 1]
    np.testing.assert_allclose(ours[inside], (1 - fy) * upper + fy * lower, atol=1.01)
    assert ours[0, 0] == 0


@pytest.mark.parametrize("stride", [1, 2])
def test_contexts_are_their_formulas(stride):
    x = np.float64(IMAGE[:, ::stride, ::stride]) / 255
    moved = np.zeros_like(x)
    moved[:, 2:, 2:] = x[:, :-2, :-2]
    for context, expected in (("plain", x), ("inverted", 1 - x), ("low_contrast", 0.35 + 0.3 * moved)):
        data = in_context(DATA, context=context, stride=stride)
        assert data["image"].dtype == np.float32
        np.testing.assert_allclose(data["image"], expected, atol=1e-6)
        np.testing.assert_array_equal(data["label"], DATA["label"])


def test_noise_is_gaussian_clipped_and_of_its_seed():
    gray = {"image": np.full((20, 28, 28, 1), 127.5, np.float32)}
    noisy, again, other = (in_context(gray, context="noisy", seed=seed)["image"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(noisy, again)
    assert np.any(noisy != other)
    assert (noisy.min(), noisy.max()) == (0, 1)
    inner = (noisy > 0) & (noisy < 1)
    np.testing.assert_allclose(1 - inner.mean(), 0.153, atol=0.03)  # P(|N(0, 1)| > 0.5 / 0.35)
    np.testing.assert_allclose(np.mean(np.abs(noisy - 0.5) < 0.35), 0.683, atol=0.03)
    np.testing.assert_allclose(noisy.mean(), 0.5, atol=0.02)


def test_an_unknown_context_is_refused():
    with pytest.raises(UserError, match="no 'dark'"):
        in_context(DATA, context="dark")
