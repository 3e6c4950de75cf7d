"""Prompts of in-context learning: how they are drawn, written as tokens, shifted for evaluation and scored.

Garg, Tsipras, Liang & Valiant, NeurIPS 2022 (arXiv 2208.01066); official code: dtsip/in-context-learning.
Shapes: B prompts of K points in d dimensions; xs [B, K, d], ys [B, K]. Prediction i, for x_i, is made from
the i examples before it; a predictor is a function `predict(xs, ys) -> preds` [B, K] that keeps to them.

What differs from the official code:

- The length of a prompt does not change with the curriculum. All K points are drawn and the loss is averaged
  over the first n_points: for a causal predictor the same loss and gradient, with nothing to recompile.
- The prompts of a step are a function of (key, step), so a resumed run sees those of an uninterrupted one.

A `Shift` changes the inputs of evaluation prompts. Prompts whose labels change are standard ones of another
function class: `linear(scale=c)` is "scale y", `noisy_linear(renormalize=True)` is "noisy", and any class
the model was not trained on is "out of class".
"""

from collections.abc import Callable, Mapping
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from jaxlab.core import Batch, Stream, UserError
from jaxlab.data.permutation import permuted_index
from jaxlab.methods.in_context.functions import (
    FunctionClass,
    PointLoss,
    random_covariance_factor,
    sample_gaussian_inputs,
    squared_error,
)

Predictor = Callable[[jax.Array, jax.Array], jax.Array]
# `shift(key, xs) -> (context, query)` of inputs xs ~ N(0, I): prediction i is asked for query[:, i] after
# context[:, :i]. A query of None is the context itself.
Shift = Callable[[chex.PRNGKey, jax.Array], tuple[jax.Array, jax.Array | None]]


def curriculum_value(step: jax.Array | int, start: int, end: int, inc: int, interval: int) -> jax.Array:
    """min(start + inc ⌊step / interval⌋, end), the dimensions or points at a step; int32, traceable."""
    return jnp.minimum(start + inc * (jnp.asarray(step, jnp.int32) // interval), end)


def sample_prompts(
    key: chex.PRNGKey,
    step: jax.Array | int,
    function: FunctionClass,
    B: int,
    K: int,
    d: int,
    *,
    n_active: jax.Array | int | None = None,
) -> tuple[chex.ArrayTree, jax.Array, jax.Array]:
    """Prompts of fresh functions on inputs N(0, I), zero from coordinate `n_active` on.

    Inputs, function and noise of prompt j depend on `key`, `step` and j only.

    Returns:
      The functions' params, xs [B, K, d] and ys [B, K].
    """
    input_key, function_key, noise_key = jax.random.split(jax.random.fold_in(key, step), 3)
    xs = sample_gaussian_inputs(input_key, B, K, d, n_active=n_active)
    params = function.sample(function_key, B, d, n_active)
    return params, xs, function.evaluate(params, xs, noise_key)


def in_context_prompts(
    function: FunctionClass,
    *,
    batch_size: int,
    num_points: int,
    dimension: int,
    dims_curriculum: Mapping[str, int] | None = None,
    points_curriculum: Mapping[str, int] | None = None,
    num_training_examples: int | None = None,
) -> Stream:
    """A stream of prompts, generated on the device.

    A batch is {"xs": [B, K, d], "ys": [B, K], "n_dims": [B], "n_points": [B]}; the last two are int32, the
    same for all of a batch: how many coordinates are not zero, and how many points are to be learnt from.

    Args:
      function: what the labels are of.
      batch_size: B.
      num_points: K, at the end of the curriculum. Learned positions beyond it are never trained.
      dimension: d, at the end of the curriculum.
      dims_curriculum: {"start", "end", "inc", "interval"} of `curriculum_value` for `n_dims`; always d if
        None. In the paper: 5 to d, 1 more each 2000 steps.
      points_curriculum: likewise for `n_points`; always K if None. In the paper: 11 to 2d + 1, 2 more each
        2000 steps; 26 to 5d + 1, 5 more, for trees and networks.
      num_training_examples: of how many fixed prompts, with their functions and noise, every batch has B
        different ones, as in the official code; those of each seed are its own, and labels that a class
        scales by those of all the batch are scaled prompt by prompt. Fresh prompts if None.

    Raises:
      UserError: a curriculum lacks a value, or one is out of range; there are fewer fixed prompts than a
        batch has, or a curriculum that would change them.
    """
    _check_curriculum("dims_curriculum", dims_curriculum, dimension)
    _check_curriculum("points_curriculum", points_curriculum, num_points)
    if num_training_examples is not None:
        if num_training_examples < batch_size:
            raise UserError(
                f"num_training_examples: {num_training_examples} are fewer than a batch of {batch_size}."
            )
        if dims_curriculum or points_curriculum:
            raise UserError("num_training_examples: fixed prompts have no curriculum; leave one of them out.")

    def draw(step: jax.Array, key: chex.PRNGKey, n_dims: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        if num_training_examples is None:
            return sample_prompts(key, step, function, batch_size, num_points, dimension, n_active=n_dims)[1:]
        order_key, prompts_key = jax.random.split(key)
        order_key = jax.random.fold_in(order_key, step)
        prompts = permuted_index(order_key, jnp.arange(batch_size), num_training_examples)
        _, xs, ys = jax.vmap(
            lambda prompt: sample_prompts(prompts_key, prompt, function, 1, num_points, dimension)
        )(prompts)
        return xs[:, 0], ys[:, 0]

    def batch(step: jax.Array, key: chex.PRNGKey) -> Batch:
        n_dims = curriculum_value(step, **dims_curriculum) if dims_curriculum else dimension
        n_points = curriculum_value(step, **points_curriculum) if points_curriculum else num_points
        xs, ys = draw(step, key, n_dims)
        return {
            "xs": xs,
            "ys": ys,
            "n_dims": jnp.full(batch_size, n_dims, jnp.int32),
            "n_points": jnp.full(batch_size, n_points, jnp.int32),
        }

    return Stream(batch, on_device=True)


def _check_curriculum(name: str, curriculum: Mapping[str, int] | None, maximum: int) -> None:
    expected = {"start", "end", "inc", "interval"}
    if curriculum and (
        set(curriculum) != expected or min(curriculum.values()) < 1 or curriculum["end"] > maximum
    ):
        raise UserError(
            f"{name}: expected start, end, inc and interval, each at least 1 and end at most {maximum},"
            f" got {dict(curriculum)}."
        )


def interleave(xs: jax.Array, ys: jax.Array, layout: Literal["shared", "own"] = "shared") -> jax.Array:
    """The tokens x_0, y_0, x_1, y_1, ..., with what a token has no value for being 0.

    Args:
      xs: [B, K, d].
      ys: [B, K].
      layout: "shared", a label in coordinate 0, where inputs have theirs, as Garg et al.; or "own", a label
        in slot 0 and an input in slots 1 to d, as Raventós et al. and Akyürek et al.

    Returns:
      [B, 2K, d] or [B, 2K, d + 1].

    Raises:
      UserError: unknown `layout`.
    """
    chex.assert_equal_shape_prefix([xs, ys], 2)
    if layout not in ("shared", "own"):
        raise UserError(f"layout: expected 'shared' or 'own', got {layout!r}.")
    if layout == "own":
        xs = jnp.pad(xs, ((0, 0), (0, 0), (1, 0)))
    batch, length, width = xs.shape
    labels = jnp.pad(ys[..., None], ((0, 0), (0, 0), (0, width - 1)))
    return jnp.stack([xs, labels], axis=2).reshape(batch, 2 * length, width)


def read_predictions(out: jax.Array) -> jax.Array:
    """The predictions at the tokens of the inputs; [B, 2K, 1] -> [B, K]."""
    return out[:, ::2, 0]


def prefix_loss(
    preds: jax.Array, ys: jax.Array, n_points: jax.Array | int, loss: PointLoss = squared_error
) -> jax.Array:
    """The mean loss of the first `n_points` predictions, that of no example included, of all prompts.

    Args:
      preds: [B, K].
      ys: [B, K].
      n_points: at least 1, for all prompts or [B]; may be traced.
      loss: of each point.
    """
    mask = jnp.arange(ys.shape[1]) < jnp.reshape(n_points, (-1, 1))
    return jnp.mean(loss(preds, ys), where=mask)


def standard() -> Shift:
    """Prompts as in training, without truncation."""
    return lambda key, xs: (xs, None)


def skewed() -> Shift:
    """Inputs of covariance eigenvalues proportional to 1/j², j = 1, ..., d, and trace d, in a random basis.

    The basis is one for all prompts of a call: shift the prompts of an evaluation at once.
    """
    return _transformed(lambda d: 1 / jnp.arange(1, d + 1, dtype=jnp.float32))


def half_subspace() -> Shift:
    """Inputs of covariance trace d in a random subspace of d // 2 dimensions, the same for a whole call.

    Raises:
      UserError: when called, for one dimension.
    """

    def eigenvalues(d: int) -> jax.Array:
        if d < 2:
            raise UserError(f"half_subspace: expected at least 2 dimensions, got {d}.")
        return jnp.float32(jnp.arange(d) < d // 2)

    return _transformed(eigenvalues)


def _transformed(eigenvalues: Callable[[int], jax.Array]) -> Shift:
    def shift(key: chex.PRNGKey, xs: jax.Array) -> tuple[jax.Array, None]:
        factor = random_covariance_factor(key, eigenvalues(xs.shape[-1]), normalize=True)
        return jnp.matmul(xs, factor, precision="highest"), None

    return shift


def scale_x(*, factor: float) -> Shift:
    """All inputs times `factor`: 1/3, 1/2, 2, 3 in the paper, which divides errors by its square."""
    return lambda key, xs: (factor * xs, None)


def scale_query(*, factor: float) -> Shift:
    """Queries times `factor`, examples as they are."""
    return lambda key, xs: (xs, factor * xs)


def orthants(*, query: Literal["different", "opposite"] = "different") -> Shift:
    """All examples of a prompt in one random orthant.

    Args:
      query: "different", unmodified inputs ("random quadrants" in the official code); or "opposite", the
        negative of the example of that position.

    Raises:
      UserError: unknown `query`.
    """
    if query not in ("different", "opposite"):
        raise UserError(f"query: expected 'different' or 'opposite', got {query!r}.")

    def shift(key: chex.PRNGKey, xs: jax.Array) -> tuple[jax.Array, jax.Array]:
        signs = jax.random.rademacher(key, (len(xs), 1, xs.shape[-1]), xs.dtype)
        context = jnp.abs(xs) * signs
        return context, xs if query == "different" else -context

    return shift


def orthogonal_query() -> Shift:
    """Query i is x_i less its projection on the i examples before it, at the length of x_i; 0 for i >= d."""

    def shift(key: chex.PRNGKey, xs: jax.Array) -> tuple[jax.Array, jax.Array]:
        length, d = xs.shape[1:]
        # Column i of Q R = Xᵀ is that residual at length 1, but for the sign of R_ii.
        q, r = jnp.linalg.qr(xs[:, :d].mT)
        signed = q * jnp.where(jnp.diagonal(r, axis1=1, axis2=2) < 0, -1, 1)[:, None]
        residuals = signed.mT * jnp.linalg.norm(xs[:, :d], axis=-1, keepdims=True)
        return xs, jnp.pad(residuals, ((0, 0), (0, max(length - d, 0)), (0, 0)))

    return shift


def query_is_example() -> Shift:
    """Query i is one of the i examples before it, at random; query 0 is x_0."""

    def shift(key: chex.PRNGKey, xs: jax.Array) -> tuple[jax.Array, jax.Array]:
        examples = jnp.maximum(jnp.arange(xs.shape[1]), 1)
        index = jax.random.randint(key, xs.shape[:2], 0, examples)
        return xs, jnp.take_along_axis(xs, index[..., None], axis=1)

    return shift


def prefix_errors(
    predict: Predictor,
    function: FunctionClass,
    params: chex.ArrayTree,
    context: jax.Array,
    query: jax.Array | None = None,
    *,
    key: chex.PRNGKey | None = None,
) -> jax.Array:
    """The metric of each prompt after i = 0, ..., K - 1 examples.

    Without a query it takes one call of `predict`. With one it takes K: for prediction i the prompt is
    context[:, :i] followed by query[:, i:], labelled by the same functions, and no other prediction is used.

    Args:
      predict: the predictor.
      function: gives labels and metric.
      params: the functions.
      context: [B, K, d].
      query: [B, K, d], or None for the context's own inputs; see `Shift`.
      key: of the noise, which is the same for every i; only for functions that have some.

    Returns:
      [B, K].
    """

    def errors(xs: jax.Array) -> jax.Array:
        ys = function.evaluate(params, xs, key)
        return function.metric(predict(xs, ys), ys)

    if query is None:
        return errors(context)
    chex.assert_equal_shape([context, query])
    points = jnp.arange(context.shape[1])

    def error(i: jax.Array) -> jax.Array:
        return errors(jnp.where(points[:, None] < i, context, query))[:, i]

    return jax.lax.map(error, points).T


def aggregate(errors: jax.Array, key: chex.PRNGKey, n_boot: int = 1000) -> dict[str, jax.Array]:
    """Mean, deviation and 90% bootstrap interval over prompts, as in the official evaluation.

    Args:
      errors: [B, K], B at least 2.
      key: of the resampling of prompts, with replacement; a resample is the same for all K columns.
      n_boot: number of resamples.

    Returns:
      [K] each: `mean`, `std` (B - 1), and `low` and `high`, the entries int(0.05 n_boot) and
      int(0.95 n_boot) of the sorted means of the resamples.
    """
    size = len(errors)

    def resampled_mean(key: chex.PRNGKey) -> jax.Array:
        return jnp.mean(errors[jax.random.randint(key, (size,), 0, size)], axis=0)

    means = jnp.sort(jax.lax.map(resampled_mean, jax.random.split(key, n_boot)), axis=0)
    return {
        "mean": jnp.mean(errors, axis=0),
        "std": jnp.std(errors, axis=0, ddof=1),
        "low": means[int(0.05 * n_boot)],
        "high": means[int(0.95 * n_boot)],
    }


def gradient_alignment(predict: Predictor, xs: jax.Array, ys: jax.Array, w: jax.Array) -> jax.Array:
    """Cosine of ∇_{x_i} ŷ_i and the projection of w on the span of x_0, ..., x_{i-1}, where labels are wᵀx.

    The minimum-norm least-squares solution is that projection, so it has cosine 1 for every i > 0.

    Args:
      predict: the predictor; differentiated.
      xs: [B, K, d].
      ys: [B, K].
      w: [B, d].

    Returns:
      [B, K]; 0 where either vector is zero, as the projection is for i = 0.
    """
    gradient, projection = query_gradients(predict, xs, ys), span_projection(xs, w)
    return jnp.sum(_normalize(gradient) * _normalize(projection), axis=-1)


def query_gradients(predict: Predictor, xs: jax.Array, ys: jax.Array) -> jax.Array:
    """∇_{x_i} ŷ_i for every i; [B, K, d], [B, K] -> [B, K, d]. It takes a backward pass for each i."""

    def gradient(i: jax.Array) -> jax.Array:
        return jax.grad(lambda xs: jnp.sum(predict(xs, ys)[:, i]))(xs)[:, i]

    return jax.lax.map(gradient, jnp.arange(xs.shape[1])).swapaxes(0, 1)


def span_projection(xs: jax.Array, w: jax.Array) -> jax.Array:
    """The projection of w on the span of x_0, ..., x_{i-1}, for every i; [B, K, d], [B, d] -> [B, K, d]."""
    points = jnp.arange(xs.shape[1])

    def projection(i: jax.Array) -> jax.Array:
        seen = jnp.where(points[:, None] < i, xs, 0)
        _, singular, basis = jnp.linalg.svd(seen, full_matrices=False)
        tolerance = max(xs.shape[1:]) * jnp.finfo(xs.dtype).eps * singular[:, :1]
        coordinates = jnp.matmul(basis, w[..., None], precision="highest")[..., 0]
        coordinates = jnp.where(singular > tolerance, coordinates, 0)
        return jnp.matmul(coordinates[:, None], basis, precision="highest")[:, 0]

    return jax.lax.map(projection, points).swapaxes(0, 1)


def _normalize(x: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1)
