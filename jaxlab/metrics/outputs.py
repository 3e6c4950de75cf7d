"""What a trained network says about a whole data set."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.core import Batch, Outputs, State, UserError
from jaxlab.core.errors import nearest

Dataset = Mapping[str, np.ndarray]  # columns of equal length
Transform = Callable[[Batch, chex.PRNGKey | None], Batch]


def collect_outputs(
    predict: Callable[[State, Batch], Outputs],
    state: State,
    dataset: Dataset,
    *,
    batch_size: int = 512,
    transforms: tuple[Transform, ...] = (),
    keys: tuple[str, ...] | None = ("logits",),
) -> dict[str, np.ndarray]:
    """Runs `predict` over every row of a data set, in order.

    Every batch has the same shape, so that `predict` is compiled once: the last one is filled up by
    repeating the last row, and what it says about the repeats is dropped.

    Args:
      predict: compiled `predict(state, batch) -> outputs`, each output with the batch axis first.
      state: the state to predict with.
      dataset: columns of N rows. A batch holds them all, and the row numbers as `index` where the data
        set has no such column.
      batch_size: rows per batch; a data set with fewer is one batch of its own size.
      transforms: applied in turn before `predict`, without a key.
      keys: the outputs to keep; None: all.

    Returns:
      `{key: array [N, ...]}` on the host.

    Raises:
      UserError: the data set is empty, the batch size below 1, or there is no such output.
    """
    collected = []
    for outputs, rows in predict_batches(
        predict, state, dataset, batch_size=batch_size, transforms=transforms
    ):
        for key in keys or ():
            if key not in outputs:
                raise UserError(f"network: it has no output '{key}'.{nearest(key, outputs)}")
        kept = outputs if keys is None else keys
        collected.append({key: np.asarray(outputs[key])[:rows] for key in kept})
    return {key: np.concatenate([batch[key] for batch in collected]) for key in collected[0]}


def predict_batches(
    predict: Callable[[State, Batch], Outputs],
    state: State,
    dataset: Dataset,
    *,
    batch_size: int = 512,
    transforms: tuple[Transform, ...] = (),
) -> Iterator[tuple[Outputs, int]]:
    """Yields what `predict` says of each batch of a data set, for what is too large to be collected.

    Arguments and batches are those of `collect_outputs`. With each come the number of its rows that are the
    data set's own: all but in the last, which those that fill it up follow.

    Raises:
      UserError: the data set is empty or the batch size below 1.
    """
    size = len(next(iter(dataset.values()), ()))
    if size == 0:
        raise UserError("dataset: it has no rows to predict; check its split.")
    if batch_size < 1:
        raise UserError(f"batch_size: expected 1 or more, got {batch_size}.")
    columns = {"index": np.arange(size, dtype=np.int32), **dataset}
    batch_size = min(batch_size, size)
    for start in range(0, size, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), size - 1)
        batch = {name: column[rows] for name, column in columns.items()}
        yield predict(state, _transform(tuple(transforms), batch)), min(batch_size, size - start)


def map_rows(
    function: Callable[[Batch], chex.ArrayTree],
    dataset: Dataset,
    *,
    batch_size: int = 512,
    transforms: tuple[Transform, ...] = (),
) -> chex.ArrayTree:
    """Computes something of every row of a data set within a traced program, a batch at a time.

    It is `collect_outputs` for `init` of a method, where the variables may be those of many seeds.

    Args:
      function: `function(batch) -> tree` of arrays with the batch axis first.
      dataset: columns of N rows.
      batch_size: rows per batch; the last one is filled up by repeating the last row.
      transforms: applied in turn before `function`, without a key.

    Returns:
      The tree, with leading axis [N].
    """
    if batch_size < 1:
        raise UserError(f"batch_size: expected 1 or more, got {batch_size}.")
    columns = {name: jnp.asarray(column) for name, column in dataset.items()}
    size = len(next(iter(columns.values())))
    batch_size = min(batch_size, size)
    rows = jnp.minimum(jnp.arange(-(-size // batch_size) * batch_size), size - 1)

    def of_batch(rows: jax.Array) -> chex.ArrayTree:
        batch = {name: column[rows] for name, column in columns.items()}
        for transform in transforms:
            batch = transform(batch, None)
        return function(batch)

    mapped = jax.lax.map(of_batch, rows.reshape(-1, batch_size))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], mapped)


# At module level, so that a chain of transforms is compiled once and not at every evaluation.
@functools.partial(jax.jit, static_argnums=0)
def _transform(transforms: tuple[Transform, ...], batch: Batch) -> dict[str, Any]:
    for transform in transforms:
        batch = transform(batch, None)
    return dict(batch)
