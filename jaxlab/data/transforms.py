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


def resize(*, size: int) -> Transform:
    """Images of `size` × `size` pixels (bilinear, antialiased, whatever their proportions); float32."""

    def transform(batch: Batch, key: chex.PRNGKey | None) -> Batch:
        image = jnp.asarray(batch["image"], jnp.float32)
        shape = (len(image), size, size, image.shape[-1])
        return {**batch, "image": jax.image.resize(image, shape, "linear")}

    return transform


def random_resized_crop(
    *, size: int, scale: tuple[float, float] = (0.7, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Transform:
    """A random part of each image, resized to `size` × `size` (bilinear, antialiased); float32.

    Args:
      size: in pixels.
      scale: the part's share of the image's area is uniform between these.
      ratio: its width over its height is log-uniform between these. A part that would be wider or higher than
        the image is cut, where torchvision draws again.
    """

    def transform(batch: Batch, key: chex.PRNGKey) -> Batch:
        image = jnp.asarray(batch["image"], jnp.float32)
        chex.assert_rank(image, 4)
        whole = jnp.float32(image.shape[1:3])
        area_key, ratio_key, corner_key = jax.random.split(key, 3)
        count = len(image)
        area = jax.random.uniform(area_key, (count,), minval=scale[0], maxval=scale[1]) * whole.prod()
        low, high = jnp.log(jnp.float32(ratio))
        aspect = jnp.exp(jax.random.uniform(ratio_key, (count,), minval=low, maxval=high))
        part = jnp.minimum(jnp.stack([jnp.sqrt(area / aspect), jnp.sqrt(area * aspect)], axis=1), whole)
        corner = jax.random.uniform(corner_key, (count, 2)) * (whole - part)

        def crop(image: jax.Array, part: jax.Array, corner: jax.Array) -> jax.Array:
            zoom = size / part
            shape = (size, size, image.shape[-1])
            return jax.image.scale_and_translate(image, shape, (0, 1), zoom, -corner * zoom, "linear")

        return {**batch, "image": jax.vmap(crop)(image, part, corner)}

    return transform


_LUMA = (0.299, 0.587, 0.114)  # grey of red, green and blue, as in ITU-R BT.601


def _gray(image: jax.Array) -> jax.Array:
    return jnp.sum(image * jnp.float32(_LUMA), axis=-1, keepdims=True)


def color_jitter(
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    maximum: float = 255.0,
) -> Transform:
    """Changes brightness, contrast, saturation and hue of each RGB image at random; float32.

    They come in this order, where torchvision draws the order too.

    Args:
      brightness, contrast, saturation: x: the factor is uniform in [1 - x, 1 + x]. 1 changes nothing.
      hue: the shift is uniform in [-x, x] of the whole circle; at most 0.5.
      maximum: the value of white.
    """

    def transform(batch: Batch, key: chex.PRNGKey) -> Batch:
        image = jnp.asarray(batch["image"], jnp.float32) / maximum
        chex.assert_axis_dimension(image, -1, 3)
        keys = jax.random.split(key, 4)

        def factor(key: chex.PRNGKey, amount: float) -> jax.Array:
            return jax.random.uniform(key, (len(image), 1, 1, 1), minval=1 - amount, maxval=1 + amount)

        def blend(image: jax.Array, other: jax.Array, share: jax.Array) -> jax.Array:
            return jnp.clip(share * image + (1 - share) * other, 0, 1)

        image = blend(image, jnp.zeros_like(image), factor(keys[0], brightness))
        mean = _gray(image).mean((1, 2), keepdims=True)
        image = blend(image, mean, factor(keys[1], contrast))
        image = blend(image, _gray(image), factor(keys[2], saturation))
        image = _shift_hue(image, factor(keys[3], hue) - 1)
        return {**batch, "image": image * maximum}

    return transform


def _shift_hue(image: jax.Array, shift: jax.Array) -> jax.Array:
    """RGB in [0, 1] with the hue of HSV moved by a share of the circle."""
    value, lowest = image.max(-1), image.min(-1)
    chroma = value - lowest
    safe = jnp.where(chroma > 0, chroma, 1.0)
    red, green, blue = jnp.moveaxis(image, -1, 0)
    sector = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = jnp.where(chroma > 0, sector, 0.0)[..., None] + 6 * shift
    # Each channel is a trapezoid of the hue, red's beginning at 5, green's at 3, blue's at 1.
    place = (jnp.float32([5, 3, 1]) + hue) % 6
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(place, 4 - place), 0, 1)


def random_grayscale(*, probability: float = 0.1) -> Transform:
    """Takes the colour from each RGB image with this probability; float32."""

    def transform(batch: Batch, key: chex.PRNGKey) -> Batch:
        image = jnp.asarray(batch["image"], jnp.float32)
        chex.assert_axis_dimension(image, -1, 3)
        chosen = jax.random.bernoulli(key, probability, (len(image), 1, 1, 1))
        return {**batch, "image": jnp.where(chosen, _gray(image), image)}

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
