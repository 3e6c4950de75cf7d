"""A problem small enough for tests of the system: two Gaussian blobs, generated on the device or the host."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.core import Evaluator, Stream


def _blobs(key, batch_size):
    label_key, noise_key = jax.random.split(key)
    label = jax.random.bernoulli(label_key, shape=(batch_size,)).astype(jnp.int32)
    image = jax.random.normal(noise_key, (batch_size, 2, 2, 1)) + 2.0 * label[:, None, None, None]
    return {"image": image, "label": label, "index": jnp.arange(batch_size)}


def blobs(batch_size: int, on_device: bool = True) -> Stream:
    """A stream whose batches are the same on the device and on the host."""

    def batch(step, key):
        made = _blobs(jax.random.fold_in(key, step), batch_size)
        return made if on_device else jax.tree.map(np.asarray, made)

    return Stream(batch, on_device)


def accuracy(count: int = 64) -> Evaluator:
    """Accuracy on a fixed draw of the blobs, and the sorted margins as a curve."""

    def evaluate(predict, state):
        batch = jax.tree.map(np.asarray, _blobs(jax.random.key(99), count))
        logits = np.asarray(predict(state, batch)["logits"])
        return {
            "accuracy": np.mean(logits.argmax(-1) == batch["label"]),
            "margins": np.sort(logits[:, 1] - logits[:, 0]),
        }

    return Evaluator(evaluate)


def exploding(batch_size: int, at: int) -> Stream:
    """Blobs, with an infinite image from step `at` on."""

    def batch(step, key):
        made = _blobs(jax.random.fold_in(key, step), batch_size)
        return {**made, "image": jnp.where(step >= at, jnp.inf, made["image"])}

    return Stream(batch, on_device=True)
