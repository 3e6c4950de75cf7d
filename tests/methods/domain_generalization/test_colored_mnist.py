import jax
import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.methods.domain_generalization.colored_mnist import (
    colored_mnist,
    every_third,
    full_batch,
    make_colored_mnist,
    without_color,
)
from tests.methods.domain_generalization import problem

RNG = np.random.default_rng(0)
SIZE = 40
IMAGES = RNG.integers(0, 256, (SIZE, 28, 28), dtype=np.uint8)
DIGITS = RNG.integers(0, 10, SIZE, np.int32)
DRAWS = RNG.random((2, SIZE)).astype(np.float32)


def _by_hand(images, digits, u_label, u_color, e, stride):
    """The sheet's construction, a digit after the other; channels come first, as there."""
    xs, ys, colors = [], [], []
    for image, digit, u_1, u_2 in zip(images, digits, u_label, u_color):
        small = image[::stride, ::stride]
        b = 1.0 if digit < 5 else 0.0
        y = abs(b - (1.0 if u_1 < 0.25 else 0.0))
        color = abs(y - (1.0 if u_2 < e else 0.0))
        x = np.stack([small, small]).astype(np.float64)
        x[int(1 - color)] *= 0
        xs.append(x / 255.0)
        ys.append(y)
        colors.append(color)
    return np.stack(xs), np.array(ys), np.array(colors)


@pytest.mark.parametrize(("flip", "stride"), [(0.1, 2), (0.9, 1)])
def test_digits_are_coloured_as_by_hand(flip, stride):
    x, y, color = _by_hand(IMAGES, DIGITS, *DRAWS, flip, stride)
    traced = jax.jit(make_colored_mnist, static_argnums=5)
    for make in (make_colored_mnist, traced):
        image, label, ours = make(IMAGES[..., None], DIGITS, *DRAWS, flip, stride)
        assert (image.dtype, label.dtype, ours.dtype) == (np.float32, np.int32, np.int32)
        np.testing.assert_allclose(np.moveaxis(image, -1, 1), x, rtol=1e-6)
        np.testing.assert_array_equal(label, y)
        np.testing.assert_array_equal(ours, color)
    assert isinstance(make_colored_mnist(IMAGES, DIGITS, *DRAWS, flip, stride)[0], np.ndarray)


def _pool(size):
    """Digits whose upper left pixels, every second one, hold their number in base 250."""
    image = np.zeros((size, 28, 28, 1), np.uint8)
    image[:, 0, 0, 0], image[:, 0, 2, 0] = np.divmod(np.arange(size), 250)
    image[:, 2, 2] = 1
    return {"image": image, "label": RNG.integers(0, 10, size, np.int32)}


def _number(image):
    pixels = np.rint(255 * np.asarray(image).sum(-1)).astype(int)
    return 250 * pixels[..., 0, 0] + pixels[..., 0, 1]


def _within(share, expected, count):
    assert abs(share - expected) < 4 * (expected * (1 - expected) / count) ** 0.5


def test_a_full_batch_is_the_whole_pool_with_the_noise_of_each_environment():
    pool, flips = _pool(6000), (0.2, 0.1, 0.9)
    stream = full_batch(pool, flips=flips)
    assert stream.on_device
    compiled = jax.jit(stream.batch)
    batch = jax.device_get(compiled(0, problem.KEY))
    assert {name: column.shape for name, column in batch.items()} == {
        "image": (3, 2000, 14, 14, 2),
        "label": (3, 2000),
        "context": (3, 2000),
    }
    number = _number(batch["image"])
    np.testing.assert_array_equal(np.sort(number.ravel()), np.arange(6000))
    color = batch["image"][..., 1, 1, :].argmax(-1)
    assert np.all(np.count_nonzero(batch["image"][..., 1, 1, :], axis=-1) == 1)
    np.testing.assert_array_equal(batch["context"], np.broadcast_to(np.arange(3)[:, None], color.shape))
    truth = pool["label"][number] < 5
    for e, flip in enumerate(flips):
        wrong, flipped = batch["label"][e] != truth[e], batch["label"][e] != color[e]
        _within(wrong.mean(), 0.25, 2000)
        _within(flipped.mean(), flip, 2000)
        _within(np.mean(wrong & flipped), 0.25 * flip, 2000)
        assert abs(np.corrcoef(number[e], np.arange(2000))[0, 1]) < 0.1  # in a random order

    again, other = (jax.device_get(compiled(*x)) for x in ((9, problem.KEY), (0, jax.random.key(1))))
    jax.tree.map(np.testing.assert_array_equal, again, batch)  # every step has the same
    assert np.mean(_number(other["image"]) == number) < 0.01  # and every replica its own


def test_transforms_see_all_environments_as_one_and_the_context_may_be_the_colour():
    def first_rows(batch, key):
        return {**batch, "image": batch["image"][:, :2], "seen": batch["image"][:, 2, 2].argmax(-1)}

    stream = full_batch(_pool(8), stride=1, context="color", transforms=(first_rows, without_color()))
    batch = jax.jit(stream.batch)(0, problem.KEY)
    assert batch["image"].shape == (2, 4, 2, 28, 1)
    np.testing.assert_array_equal(batch["context"], batch["seen"])


def test_digits_that_cannot_be_shared_out_are_refused():
    with pytest.raises(UserError, match="7 digits are not a multiple of 2"):
        full_batch(_pool(7))
    with pytest.raises(UserError, match="not a multiple of 0"):
        full_batch(_pool(7), flips=())


def test_a_data_set_has_the_noise_of_its_environment_and_of_its_seed():
    pool = _pool(4000)
    data = colored_mnist(pool, flip=0.9, seed=3)
    _within(np.mean(data["label"] != (pool["label"] < 5)), 0.25, 4000)
    _within(np.mean(data["label"] != data["color"]), 0.9, 4000)
    np.testing.assert_array_equal(_number(data["image"]), np.arange(4000))
    np.testing.assert_array_equal(data["image"][:, 1, 1].argmax(-1), data["color"])
    other = colored_mnist(pool, flip=0.9, seed=4)
    assert np.any(other["label"] != data["label"])


def test_without_color_only_the_digit_is_left():
    batch = {"image": make_colored_mnist(IMAGES, DIGITS, *DRAWS, 0.5)[0]}
    gray = jax.jit(without_color())(batch, None)["image"]
    np.testing.assert_allclose(gray[..., 0], IMAGES[:, ::2, ::2] / 255, rtol=1e-6)


def test_three_environments_share_a_random_order_and_no_digit():
    pool = _pool(10)
    thirds = [every_third(pool, start=start, seed=1) for start in range(3)]
    assert [len(third["label"]) for third in thirds] == [4, 3, 3]
    numbers = [_number(third["image"][:, ::2, ::2] / 255) for third in thirds]
    order = np.random.default_rng(1).permutation(10)
    for start, (third, number) in enumerate(zip(thirds, numbers)):
        np.testing.assert_array_equal(number, order[start::3])
        np.testing.assert_array_equal(third["label"], pool["label"][number])
