"""A tiny classification problem, and networks with and without batch normalisation."""

import jax
import numpy as np

from jaxlab.nn.mlp import mlp

KEY = jax.random.key(0)
CLASSES = 3
NETWORK = mlp(CLASSES, hidden=(6, 5))
NORMALIZED = mlp(CLASSES, hidden=(6, 5), norm="batch_norm")


def batch(step=0, size=16):
    rng = np.random.default_rng(step)
    label = rng.integers(0, CLASSES, size).astype(np.int32)
    image = rng.normal(size=(size, 2, 2, 1)) + label[:, None, None, None]
    return {"image": image.astype(np.float32), "label": label}


def run(method, steps, state=None, first=0):
    state = jax.jit(method.init)(KEY, batch()) if state is None else state
    update, metrics = jax.jit(method.update), []
    for step in range(first, first + steps):
        state, of_step = update(state, batch(step), jax.random.fold_in(KEY, step))
        metrics.append(jax.device_get(of_step))
    assert update._cache_size() <= 1
    return state, metrics


def changed(before, after):
    """The names of the modules of which a parameter differs."""
    return {
        name
        for name in before
        if any(
            not np.array_equal(x, y)
            for x, y in zip(jax.tree.leaves(before[name]), jax.tree.leaves(after[name]))
        )
    }
