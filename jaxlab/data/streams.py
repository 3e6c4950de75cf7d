"""Streams of training batches: resident on the device, generated there, or read by the host.

Every batch is a pure function of the step and of a key, so a resumed run sees the batches of one that was
never stopped. Batches of a data set carry `index`, int32 [B]: the positions of their examples in it.

`resident` and `host` go through one random order of the data set after another, each example once in an
epoch. Batch `step` is positions `step * B` to `(step + 1) * B - 1` of that endless sequence, hence a batch
may straddle two epochs, and none is short.
"""

from collections.abc import Callable, Mapping

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.core import Batch, Stream, UserError
from jaxlab.data import store
from jaxlab.data.permutation import permuted_index
from jaxlab.data.transforms import Transform, apply


def resident(
    dataset: Mapping[str, np.ndarray], *, batch_size: int, transforms: tuple[Transform, ...] = ()
) -> Stream:
    """A stream over a data set that fits on the device; order, gathering and transforms are compiled in.

    Args:
      dataset: numeric columns of equal length.
      batch_size: B.
      transforms: applied in turn; each gets a key of its own at every step.

    Raises:
      UserError: the data set is empty or too large to address.
    """
    columns = {name: jnp.asarray(column) for name, column in dataset.items()}
    chex.assert_equal_shape_prefix(list(columns.values()), 1)
    size = len(next(iter(columns.values())))
    if not 0 < size * batch_size < 2**31:
        raise UserError(
            f"a resident stream of {size} examples with batch_size {batch_size}: their product must be in"
            " 1..2^31 - 1; take streams.host for more."
        )
    # How many epochs a batch can touch: more than one only where batches do not divide them.
    num_epochs = 1 if size % batch_size == 0 else (batch_size - 2) // size + 2

    def batch(step: jax.Array, key: chex.PRNGKey) -> Batch:
        order_key, transform_key = jax.random.split(key)
        # `size` steps are `batch_size` whole epochs; counting from there, positions stay below 2^31.
        position = step % size * batch_size + jnp.arange(batch_size)
        first_epoch = position[0] // size
        epochs = step // size * batch_size + first_epoch + jnp.arange(num_epochs)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(order_key, epochs)
        orders = jax.vmap(permuted_index, (0, None, None))(keys, position % size, size)
        index = jnp.take_along_axis(orders, (position // size - first_epoch)[None], axis=0)[0]
        examples = {name: column[index] for name, column in columns.items()}
        return apply({**examples, "index": index}, jax.random.fold_in(transform_key, step), transforms)

    return Stream(batch, on_device=True)


def generated(sample: Callable[[chex.PRNGKey], Batch]) -> Stream:
    """A stream of fresh data, `sample(key) -> batch`, with a new key at each step."""
    return Stream(lambda step, key: sample(jax.random.fold_in(key, step)), on_device=True)


def host(
    dataset: str,
    *,
    split: str = "train",
    batch_size: int,
    data_dir: str | None = None,
    transforms: tuple[Transform, ...] = (),
) -> Stream:
    """A stream over a data set that stays on disk, of any size, in an order that Grain shuffles.

    Batches are NumPy. `batch` may be called from several threads: reading ahead is calling it for the
    steps to come, which decodes large images in parallel.

    Args:
      dataset: see `store.open_builder`.
      split: TFDS's split string.
      batch_size: B.
      data_dir: see `store.data_folder`.
      transforms: as in `resident`; computed on the CPU.

    Raises:
      UserError: no such data set or split; `batch` raises it where a file is damaged.
    """
    source = store.open_source(dataset, split, data_dir)
    cpu = jax.local_devices(backend="cpu")[0]
    transform = jax.jit(lambda batch, key: apply(batch, key, transforms))

    def batch(step: int, key: chex.PRNGKey) -> Batch:
        order_key, transform_key = jax.random.split(jax.device_put(key, cpu))  # all that follows is there
        seed = int(jax.random.bits(order_key))
        order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().batch(batch_size)
        index = order[int(step)]
        examples = {**store.read(source, index), "index": index.astype(np.int32)}
        if not transforms:
            return examples
        return jax.device_get(transform(examples, jax.random.fold_in(transform_key, step)))

    return Stream(batch, on_device=False)


def with_auxiliary(stream: Stream, auxiliary: Stream) -> Stream:
    """Adds a second stream's batch (outliers, another domain) to each batch, under `auxiliary`.

    Raises:
      UserError: one stream is on the device and the other is not.
    """
    if stream.on_device != auxiliary.on_device:
        raise UserError("streams.with_auxiliary: both streams must be on the device, or both on the host.")

    def batch(step: jax.Array, key: chex.PRNGKey) -> Batch:
        key, auxiliary_key = jax.random.split(key)
        return {**stream.batch(step, key), "auxiliary": auxiliary.batch(step, auxiliary_key)}

    return Stream(batch, stream.on_device)
