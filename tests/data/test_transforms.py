import jax
import jax.numpy as jnp
import numpy as np

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
