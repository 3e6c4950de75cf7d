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
from jaxlab.core.errors import nearest
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
    columns, size = _on_device(dataset)
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


def sampled(
    dataset: Mapping[str, np.ndarray], *, batch_size: int, transforms: tuple[Transform, ...] = ()
) -> Stream:
    """A stream over a data set that fits on the device, each example drawn at random with replacement.

    Args:
      dataset: numeric columns of equal length.
      batch_size: B.
      transforms: applied in turn; each gets a key of its own at every step.

    Raises:
      UserError: the data set is empty.
    """
    columns, size = _on_device(dataset)
    if size == 0:
        raise UserError("dataset: it has no rows to draw from; check its split.")

    def batch(step: jax.Array, key: chex.PRNGKey) -> Batch:
        index_key, transform_key = jax.random.split(jax.random.fold_in(key, step))
        index = jax.random.randint(index_key, (batch_size,), 0, size)
        examples = {name: column[index] for name, column in columns.items()}
        return apply({**examples, "index": index}, transform_key, transforms)

    return Stream(batch, on_device=True)


def _on_device(dataset: Mapping[str, np.ndarray]) -> tuple[dict[str, jax.Array], int]:
    """The columns of a data set, and their length."""
    columns = {name: jnp.asarray(column) for name, column in dataset.items()}
    chex.assert_equal_shape_prefix(list(columns.values()), 1)
    return columns, len(next(iter(columns.values())))


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


def environments(streams: tuple[Stream, ...]) -> Stream:
    """Batches of environments (domains, clients), one of each stream: every column becomes [E, n, ...].

    Each has the column `context` [E, n] too, int32: the position of the environment, unless the data sets
    have a column of that name.

    Args:
      streams: E streams with batches of one size, of the same columns.

    Raises:
      UserError: there is none, or some are on the device and others are not.
    """
    if len({stream.on_device for stream in streams}) != 1:
        raise UserError("streams.environments: needs streams, all on the device or all on the host.")
    on_device = streams[0].on_device
    numpy = jnp if on_device else np

    def batch(step: jax.Array, key: chex.PRNGKey) -> Batch:
        keys = jax.random.split(key, len(streams))
        batches = [stream.batch(step, own_key) for stream, own_key in zip(streams, keys)]
        stacked = jax.tree.map(lambda *x: numpy.stack(x), *batches)
        shape = stacked["label"].shape
        context = numpy.broadcast_to(numpy.arange(len(streams), dtype=np.int32)[:, None], shape)
        return {"context": context, **stacked}

    return Stream(batch, on_device)


def grouped(
    dataset: Mapping[str, np.ndarray],
    *,
    group: str = "context",
    groups_per_batch: int,
    batch_size: int,
    transforms: tuple[Transform, ...] = (),
) -> Stream:
    """Batches [E, n, ...] of E groups drawn at random, each with n examples of it, with replacement.

    Every group that has examples is equally likely, however many; those of a batch are distinct. It is the
    group loader of WILDS (Koh, Sagawa et al., ICML 2021).

    Args:
      dataset: numeric columns of equal length.
      group: the column that holds an example's group; batches have it as `context` too.
      groups_per_batch: E.
      batch_size: n.
      transforms: applied to the examples [E · n, ...] in turn.

    Raises:
      UserError: no such column, or fewer groups than a batch needs.
    """
    if group not in dataset:
        raise UserError(f"streams.grouped: no column '{group}'.{nearest(group, dataset)}")
    groups = np.asarray(dataset[group])
    values, sizes = np.unique(groups, return_counts=True)
    if not 0 < groups_per_batch <= len(values):
        raise UserError(
            f"streams.grouped: groups_per_batch is {groups_per_batch}; there are {len(values)} groups."
        )
    columns = {name: jnp.asarray(column) for name, column in dataset.items()}
    by_group, counts = jnp.asarray(np.argsort(groups, kind="stable"), jnp.int32), jnp.asarray(sizes)
    starts = jnp.asarray(np.cumsum(sizes) - sizes)

    def batch(step: jax.Array, key: chex.PRNGKey) -> Batch:
        group_key, row_key, transform_key = jax.random.split(jax.random.fold_in(key, step), 3)
        chosen = jax.random.permutation(group_key, len(values))[:groups_per_batch]
        rows = jax.random.randint(row_key, (groups_per_batch, batch_size), 0, counts[chosen][:, None])
        index = by_group[starts[chosen][:, None] + rows].ravel()
        examples = {name: column[index] for name, column in columns.items()}
        examples = apply(
            {**examples, "context": columns[group][index], "index": index}, transform_key, transforms
        )
        shape = groups_per_batch, batch_size
        return jax.tree.map(lambda column: column.reshape(*shape, *column.shape[1:]), examples)

    return Stream(batch, on_device=True)


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
