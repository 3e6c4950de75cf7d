"""What a trained network says about a whole data set."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
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
    keys: tuple[str, ...] = ("logits",),
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
      keys: the outputs to keep.

    Returns:
      `{key: array [N, ...]}` on the host.

    Raises:
      UserError: the data set is empty, or there is no such output.
    """
    size = len(next(iter(dataset.values()), ()))
    if size == 0:
        raise UserError("dataset: it has no rows to predict; check its split.")
    columns = {"index": np.arange(size, dtype=np.int32), **dataset}
    batch_size = min(batch_size, size)
    collected = []
    for start in range(0, size, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), size - 1)
        batch = {name: column[rows] for name, column in columns.items()}
        outputs = predict(state, _transform(tuple(transforms), batch))
        for key in keys:
            if key not in outputs:
                raise UserError(f"network: it has no output '{key}'.{nearest(key, outputs)}")
        collected.append({key: np.asarray(outputs[key])[: size - start] for key in keys})
    return {key: np.concatenate([batch[key] for batch in collected]) for key in keys}


# At module level, so that a chain of transforms is compiled once and not at every evaluation.
@functools.partial(jax.jit, static_argnums=0)
def _transform(transforms: tuple[Transform, ...], batch: Batch) -> dict[str, Any]:
    for transform in transforms:
        batch = transform(batch, None)
    return dict(batch)
