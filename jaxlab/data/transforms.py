"""Transforms of a batch's images, `transform(batch, key) -> batch`: pure, on the device, of static shape."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxlab.core import Batch

Transform = Callable[[Batch, chex.PRNGKey | None], Batch]


def standardize(
    *, scale: float = 255.0, mean: tuple[float, ...] = (0.0,), std: tuple[float, ...] = (1.0,)
) -> Transform:
    """float32 images `(image / scale - mean) / std`; needs no key.

    Args:
      scale: the largest value of a pixel.
      mean: of `image / scale`, one for each channel or one for all.
      std: likewise.
    """

    def transform(batch: Batch, key: chex.PRNGKey | None) -> Batch:
        image = jnp.asarray(batch["image"], jnp.float32) / scale
        return {**batch, "image": (image - jnp.float32(mean)) / jnp.float32(std)}

    return transform


def random_crop(*, padding: int) -> Transform:
    """Pads each image with `padding` zeros on every side and crops it at random to its size again.

    Zero is black before `standardize` and the mean after it.
    """

    def transform(batch: Batch, key: chex.PRNGKey) -> Batch:
        image = jnp.asarray(batch["image"])
        chex.assert_rank(image, 4)
        padded = jnp.pad(image, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        corners = jax.random.randint(key, (len(image), 2), 0, 2 * padding + 1)

        def crop(padded_image: jax.Array, corner: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(padded_image, (corner[0], corner[1], 0), image.shape[1:])

        return {**batch, "image": jax.vmap(crop)(padded, corners)}

    return transform


def random_flip() -> Transform:
    """Mirrors each image left to right with probability 1/2."""

    def transform(batch: Batch, key: chex.PRNGKey) -> Batch:
        image = jnp.asarray(batch["image"])
        chex.assert_rank(image, 4)
        flip = jax.random.bernoulli(key, shape=(len(image), 1, 1, 1))
        return {**batch, "image": jnp.where(flip, image[:, :, ::-1], image)}

    return transform


def apply(batch: Batch, key: chex.PRNGKey, transforms: tuple[Transform, ...]) -> Batch:
    """Applies transforms one after the other, each with a key of its own."""
    for i, transform in enumerate(transforms):
        batch = transform(batch, jax.random.fold_in(key, i))
    return batch
