"""Coloured MNIST: the colour tells the label better than the digit does, until the test reverses it.

Arjovsky et al., *Invariant Risk Minimization*, arXiv 1907.02893, made as in the official code
(facebookresearch/InvariantRiskMinimization), and with `stride=1` as in DomainBed. A quarter of the labels is
wrong, so the digit tells 75 % of them; the colour disagrees with the label in a share `flip` of an
environment.

As in the code, the label before the noise is 1 for digits below 5.
"""

from collections.abc import Mapping
from typing import Literal, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.core import Batch, Stream, UserError
from jaxlab.data.transforms import Transform, apply

Dataset = Mapping[str, np.ndarray]
Array = TypeVar("Array", np.ndarray, jax.Array)

LABEL_NOISE = 0.25


def make_colored_mnist(
    images: Array, digits: Array, u_label: Array, u_color: Array, flip: float, stride: int = 2
) -> tuple[Array, Array, Array]:
    """Colours the digits of one environment. Arrays are all NumPy's, or all JAX's, and may be traced.

    Args:
      images: [N, 28, 28] or [N, 28, 28, 1] in 0..255.
      digits: integers [N].
      u_label: uniform draws [N] in [0, 1); the label is wrong where one is below 0.25.
      u_color: uniform draws [N]; the colour is not the label's where one is below `flip`.
      flip: e of the environment.
      stride: every which row and column is kept.

    Returns:
      Images float32 [N, 28 / stride, 28 / stride, 2] in [0, 1], in which the channel 1 - colour is zero;
      labels y int32 [N] in {0, 1}; colours int32 [N] in {0, 1}.
    """
    gray = images.reshape(images.shape[:3])[:, ::stride, ::stride].astype(np.float32) / np.float32(255)
    label = (digits < 5) ^ (u_label < LABEL_NOISE)
    color = label ^ (u_color < flip)
    there = (color[:, None] == np.arange(2)).astype(np.float32)
    return gray[..., None] * there[:, None, None], label.astype(np.int32), color.astype(np.int32)


def colored_mnist(dataset: Dataset, *, flip: float, stride: int = 2, seed: int = 0) -> Dataset:
    """One environment as a data set, for evaluation or for minibatches.

    Args:
      dataset: `image` [N, 28, 28, 1] and `label` [N], digits.
      flip: see `make_colored_mnist`; 0.9 in the test environment.
      stride: see `make_colored_mnist`; 1 in DomainBed.
      seed: of the draws.

    Returns:
      `image` float32 [N, 28 / stride, 28 / stride, 2], `label` and `color` int32 [N].

    Raises:
      UserError: `flip` is no share, or the stride below 1.
    """
    if not 0 <= flip <= 1 or stride < 1:
        raise UserError(f"colored_mnist: flip is {flip}, stride {stride}; give a share and 1 or more.")
    u_label, u_color = np.random.default_rng(seed).random((2, len(dataset["label"])), np.float32)
    image, label, color = make_colored_mnist(
        dataset["image"], dataset["label"], u_label, u_color, flip, stride
    )
    return {"image": image, "label": label, "color": color}


def without_color() -> Transform:
    """Adds the channels up, which leaves the grey digit: what the oracle of the IRM code sees."""
    return lambda batch, key: {**batch, "image": jnp.sum(batch["image"], axis=-1, keepdims=True)}


def every_third(dataset: Dataset, *, start: int, seed: int = 0) -> Dataset:
    """Rows start, start + 3, ... of a random order: DomainBed's three environments of one pool.

    Args:
      dataset: columns of N rows.
      start: 0, 1 or 2.
      seed: of the order, which the three environments share.

    Raises:
      UserError: there is no such environment.
    """
    if start not in (0, 1, 2):
        raise UserError(f"colored_mnist.every_third: start is {start}; it may be 0, 1 or 2.")
    order = np.random.default_rng(seed).permutation(len(dataset["label"]))
    return {name: column[order[start::3]] for name, column in dataset.items()}


def full_batch(
    dataset: Dataset,
    *,
    flips: tuple[float, ...] = (0.2, 0.1),
    stride: int = 2,
    context: Literal["environment", "color"] = "environment",
    transforms: tuple[Transform, ...] = (),
) -> Stream:
    """The stream of the IRM code: every batch is the whole training set, n = N / E of each environment.

    A replica has an order and draws of its own, as each restart of the code has: it shuffles the pool, and
    environment e takes every E-th digit from the e-th on. They are made anew inside every step, from a key
    that stays the same.

    Args:
      dataset: `image` [N, 28, 28, 1] and `label` [N], digits.
      flips: of the environments.
      stride: see `make_colored_mnist`.
      context: what `context` is.
      transforms: applied to the coloured images [E · n, ...] in turn.

    Returns:
      A stream of {"image": [E, n, ...], "label": [E, n], "context": [E, n]}.

    Raises:
      UserError: the digits cannot be shared out evenly.
    """
    num_environments, size = len(flips), len(dataset["label"])
    if not num_environments or size % num_environments:
        raise UserError(f"colored_mnist.full_batch: {size} digits are not a multiple of {num_environments}.")
    gray = np.ascontiguousarray(dataset["image"][:, ::stride, ::stride, 0])  # all that a step needs
    images, digits = jnp.asarray(gray), jnp.asarray(dataset["label"])
    flip = jnp.tile(jnp.asarray(flips, jnp.float32), size // num_environments)

    def batch(step: jax.Array, key: chex.PRNGKey) -> Batch:
        del step
        order_key, label_key, color_key, transform_key = jax.random.split(key, 4)
        order = jax.random.permutation(order_key, size)
        u_label, u_color = jax.random.uniform(label_key, (size,)), jax.random.uniform(color_key, (size,))
        image, label, color = make_colored_mnist(
            images[order], digits[order], u_label, u_color, flip, stride=1
        )
        environment = jnp.tile(jnp.arange(num_environments, dtype=jnp.int32), size // num_environments)
        columns = {"image": image, "label": label, "context": color if context == "color" else environment}
        columns = apply(columns, transform_key, transforms)

        def by_environment(column: jax.Array) -> jax.Array:
            return column.reshape(-1, num_environments, *column.shape[1:]).swapaxes(0, 1)

        return {name: by_environment(column) for name, column in columns.items()}

    return Stream(batch, on_device=True)
