"""Function classes that are learnt in context, and the Gaussian inputs of their prompts.

Shivam Garg, Dimitris Tsipras, Percy Liang, Gregory Valiant. *What Can Transformers Learn In-Context? A Case
Study of Simple Function Classes*. NeurIPS 2022 (arXiv 2208.01066). Official code:
dtsip/in-context-learning.

Shapes: B prompts of K points in d dimensions; inputs xs [B, K, d], labels ys [B, K]. What is drawn for
prompt j is a function of the key and of j: other batch sizes or device counts see the same prompts.

What differs from the official code:

- The noisy class has σ = 1, as its evaluation (the paper's appendix says σ² = d / 20, the same at d = 20),
  and the ReLU network 100 units, as the paper; the released metrics were computed with 4.
- A pool has fixed functions of any class. There, a pool is one of weights, for sparse functions the
  coordinates are drawn again at every use, and trees have none.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jaxlab.core import UserError
from jaxlab.data.permutation import permuted_index

PointLoss = Callable[[jax.Array, jax.Array], jax.Array]


class FunctionClass(NamedTuple):
    """A distribution over functions R^d -> R.

    Attributes:
      sample: `sample(key, B, d, n_active=None) -> params`, B functions, every leaf with leading axis B.
        `n_active` may be traced: all inputs are zero from that coordinate on. Only the sparse class heeds it;
        elsewhere all d coordinates are drawn and those of zero inputs are irrelevant.
      evaluate: `evaluate(params, xs, key=None) -> ys`, [B, K, d] -> [B, K] float32, to full float32
        precision. Leaves with leading axis 1 are one function for all prompts. Only noise needs the key.
      normalizer: `normalizer(d)`, E y² for inputs N(0, I): errors divided by it are 1 for the zero predictor.
      loss: `loss(preds, ys)` of each point, to be trained with.
      metric: `metric(preds, ys)` of each point, to be reported.
    """

    sample: Callable[..., chex.ArrayTree]
    evaluate: Callable[..., jax.Array]
    normalizer: Callable[[int], float]
    loss: PointLoss
    metric: PointLoss


def squared_error(preds: jax.Array, ys: jax.Array) -> jax.Array:
    """(ŷ - y)² of each point."""
    chex.assert_equal_shape([preds, ys])
    return jnp.square(preds - ys)


def logistic_loss(preds: jax.Array, ys: jax.Array) -> jax.Array:
    """Cross entropy, in nats, of each logit ŷ for y in {-1, 1}; y = 0 is a target of 1/2."""
    chex.assert_equal_shape([preds, ys])
    return optax.sigmoid_binary_cross_entropy(preds, (ys + 1) / 2)


def sign_accuracy(preds: jax.Array, ys: jax.Array) -> jax.Array:
    """1[sign ŷ = y] of each point."""
    chex.assert_equal_shape([preds, ys])
    return jnp.float32(jnp.sign(preds) == ys)


def sample_gaussian_inputs(
    key: chex.PRNGKey,
    B: int,
    K: int,
    d: int,
    *,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    n_active: jax.Array | int | None = None,
) -> jax.Array:
    """Inputs z `scale` + `bias` with z ~ N(0, I), zero from coordinate `n_active` on.

    Args:
      key: of the draw.
      B, K, d: prompts, points of each, dimensions.
      scale: [d, d]; see `random_covariance_factor`.
      bias: [d].
      n_active: how many coordinates are not zeroed; may be traced. All if None.

    Returns:
      [B, K, d] float32.
    """
    xs = _per_prompt(lambda key: jax.random.normal(key, (K, d), jnp.float32), key, B)
    if scale is not None:
        xs = jnp.matmul(xs, scale, precision="highest")
    if bias is not None:
        xs = xs + bias
    return xs if n_active is None else jnp.where(jnp.arange(d) < n_active, xs, 0)


def random_covariance_factor(key: chex.PRNGKey, eigenvalues: jax.Array, normalize: bool) -> jax.Array:
    """U diag(λ) Uᵀ with random orthogonal U: z times it has covariance U diag(λ²) Uᵀ for z ~ N(0, I).

    Args:
      key: of U, the left factor of the singular value decomposition of a Gaussian matrix.
      eigenvalues: λ, [d].
      normalize: whether to scale it so that the covariance has trace d; then λ must not be all zero.

    Returns:
      [d, d] float32, symmetric.
    """
    (d,) = eigenvalues.shape
    u, _, _ = jnp.linalg.svd(jax.random.normal(key, (d, d), jnp.float32))
    factor = jnp.matmul(u * eigenvalues, u.T, precision="highest")
    return factor * jnp.sqrt(d / jnp.sum(eigenvalues**2)) if normalize else factor


def linear(*, scale: float = 1.0) -> FunctionClass:
    """y = s wᵀx with w ~ N(0, I); params {"w": [B, d]}.

    Args:
      scale: s; 1/3, 1/2, 2 and 3 are the "scale y" prompts of the paper.
    """
    return FunctionClass(
        sample=_sampler(_gaussian_weight),
        evaluate=lambda params, xs, key=None: scale * _inner(xs, params["w"]),
        normalizer=lambda d: scale**2 * d,
        loss=squared_error,
        metric=squared_error,
    )


def sparse_linear(*, sparsity: int = 3) -> FunctionClass:
    """y = wᵀx, w ~ N(0, I) on a random set of coordinates and 0 elsewhere; params {"w": [B, d]}.

    Args:
      sparsity: size of that set, of which all are among the first `n_active` coordinates; where there are
        fewer, it is all of these.

    Raises:
      UserError: `sparsity` below 1.
    """
    if sparsity < 1:
        raise UserError(f"sparsity: expected at least 1, got {sparsity}.")

    def draw(key: chex.PRNGKey, d: int, n_active: jax.Array | int | None) -> dict[str, jax.Array]:
        weight_key, order_key = jax.random.split(key)
        active = jnp.arange(d) < (d if n_active is None else n_active)
        order = jnp.where(active, jax.random.uniform(order_key, (d,)), jnp.inf)
        kept = active & (jnp.argsort(jnp.argsort(order)) < sparsity)
        return {"w": jnp.where(kept, _gaussian_weight(weight_key, d, None)["w"], 0)}

    return linear()._replace(sample=_sampler(draw), normalizer=lambda d: float(min(sparsity, d)))


def linear_classification() -> FunctionClass:
    """y = sign(wᵀx) with w ~ N(0, I), and 0 at 0; params {"w": [B, d]}."""
    return linear()._replace(
        evaluate=lambda params, xs, key=None: jnp.sign(_inner(xs, params["w"])),
        normalizer=lambda d: 1.0,
        loss=logistic_loss,
        metric=sign_accuracy,
    )


def noisy_linear(*, noise_std: float = 1.0, renormalize: bool = False) -> FunctionClass:
    """y = wᵀx + ε with w ~ N(0, I) and ε ~ N(0, σ²) on every label, the query's too; params {"w": [B, d]}.

    Args:
      noise_std: σ.
      renormalize: whether labels are scaled to standard deviation √d. It is that of all labels of a call of
        `evaluate`, of which there must be two or more, and prompts are then not independent of each other.

    Raises:
      UserError: `noise_std` is negative.
    """
    if noise_std < 0:
        raise UserError(f"noise_std: expected at least 0, got {noise_std}.")

    def evaluate(params: chex.ArrayTree, xs: jax.Array, key: chex.PRNGKey) -> jax.Array:
        batch, length, d = xs.shape
        noise = _per_prompt(lambda key: jax.random.normal(key, (length,), jnp.float32), key, batch)
        ys = _inner(xs, params["w"]) + noise_std * noise
        return ys * (math.sqrt(d) / jnp.std(ys, ddof=1)) if renormalize else ys

    return linear()._replace(
        evaluate=evaluate, normalizer=lambda d: float(d) if renormalize else d + noise_std**2
    )


def quadratic(*, scale: float = 1.0) -> FunctionClass:
    """y = s / √3 Σ_j w_j x_j² with w ~ N(0, I); params {"w": [B, d]}.

    Args:
      scale: s.
    """
    return linear(scale=scale)._replace(
        evaluate=lambda params, xs, key=None: scale / math.sqrt(3) * _inner(xs**2, params["w"])
    )


def relu_network(*, hidden: int = 100, scale: float = 1.0) -> FunctionClass:
    """y = s √(2 / r) w₂ᵀ relu(W₁ᵀx), all weights N(0, 1); params {"w1": [B, d, r], "w2": [B, r]}.

    Args:
      hidden: r.
      scale: s.

    Raises:
      UserError: `hidden` below 1.
    """
    if hidden < 1:
        raise UserError(f"hidden: expected at least 1, got {hidden}.")

    def draw(key: chex.PRNGKey, d: int, n_active: jax.Array | int | None) -> dict[str, jax.Array]:
        first, second = jax.random.split(key)
        return {
            "w1": jax.random.normal(first, (d, hidden), jnp.float32),
            "w2": jax.random.normal(second, (hidden,), jnp.float32),
        }

    def evaluate(params: chex.ArrayTree, xs: jax.Array, key: chex.PRNGKey | None = None) -> jax.Array:
        features = jax.nn.relu(jnp.matmul(xs, params["w1"], precision="highest"))
        return scale * math.sqrt(2 / hidden) * _inner(features, params["w2"])

    return linear(scale=scale)._replace(sample=_sampler(draw), evaluate=evaluate)


def decision_tree(*, depth: int = 4) -> FunctionClass:
    """Complete binary trees: right where the node's coordinate is above 0, left otherwise; a leaf's value.

    Params are {"coordinate": int32 [B, 2^(depth+1) - 1], uniform over all d, "value": N(0, 1) of that shape}:
    the nodes by level, children of node i at 2i + 1 and 2i + 2. Only inner nodes' coordinates and leaves'
    values count.

    Args:
      depth: how many coordinates are looked at, in turn.

    Raises:
      UserError: `depth` below 1.
    """
    if depth < 1:
        raise UserError(f"depth: expected at least 1, got {depth}.")
    nodes = 2 ** (depth + 1) - 1

    def draw(key: chex.PRNGKey, d: int, n_active: jax.Array | int | None) -> dict[str, jax.Array]:
        coordinate_key, value_key = jax.random.split(key)
        return {
            "coordinate": jax.random.randint(coordinate_key, (nodes,), 0, d, jnp.int32),
            "value": jax.random.normal(value_key, (nodes,), jnp.float32),
        }

    def evaluate(params: chex.ArrayTree, xs: jax.Array, key: chex.PRNGKey | None = None) -> jax.Array:
        node = jnp.zeros(xs.shape[:2], jnp.int32)
        for _ in range(depth):
            coordinate = jnp.take_along_axis(params["coordinate"], node, axis=1)
            x = jnp.take_along_axis(xs, coordinate[..., None], axis=2)[..., 0]
            node = 2 * node + 1 + (x > 0)
        return jnp.take_along_axis(params["value"], node, axis=1)

    return FunctionClass(_sampler(draw), evaluate, lambda d: 1.0, squared_error, squared_error)


def task_pool(
    function: FunctionClass, *, num_tasks: int, seed: int = 0, replace: bool = True
) -> FunctionClass:
    """The class with a fixed pool of its functions in place of all (Raventós et al., NeurIPS 2023).

    The pool is not stored: its member m is drawn again, from a key of its own, wherever it is needed, so a
    pool of millions costs what none does. Without replacement, `sample(key, num_tasks, d)` is the whole pool.

    Args:
      function: the class.
      num_tasks: size of the pool.
      seed: of the pool. Nothing else changes its members, but `n_active` where the class heeds it.
      replace: whether a batch may have a function twice. If not, as in the official code, it takes the
        first B of a random order of the pool.

    Raises:
      UserError: `num_tasks` below 1; when sampled: a larger batch is to be drawn without replacement.
    """
    if num_tasks < 1:
        raise UserError(f"num_tasks: expected at least 1, got {num_tasks}.")

    def sample(key: chex.PRNGKey, B: int, d: int, n_active: jax.Array | int | None = None) -> chex.ArrayTree:
        if not replace and num_tasks < B:
            raise UserError(
                f"num_tasks: a pool of {num_tasks} has no {B} different functions; enlarge it or set replace."
            )
        if replace:
            index = _per_prompt(lambda key: jax.random.randint(key, (), 0, num_tasks), key, B)
        else:
            index = permuted_index(key, jnp.arange(B), num_tasks)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index)
        members = jax.vmap(lambda key: function.sample(key, 1, d, n_active))(keys)
        return jax.tree.map(lambda leaf: leaf[:, 0], members)

    return function._replace(sample=sample)


def pool_weights(function: FunctionClass, *, num_tasks: int, dimension: int, seed: int = 0) -> jax.Array:
    """The weights [num_tasks, d] of all functions of a linear `task_pool`, in no particular order."""
    pool = task_pool(function, num_tasks=num_tasks, seed=seed, replace=False)
    return pool.sample(jax.random.key(0), num_tasks, dimension)["w"]


def _per_prompt(
    draw: Callable[[chex.PRNGKey], chex.ArrayTree], key: chex.PRNGKey, batch_size: int
) -> chex.ArrayTree:
    """One draw for each prompt; that of prompt j depends on `key` and j only."""
    return jax.vmap(draw)(jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size)))


def _sampler(draw: Callable[..., chex.ArrayTree]) -> Callable[..., chex.ArrayTree]:
    """`FunctionClass.sample` from `draw(key, d, n_active)`, which draws one function."""

    def sample(key: chex.PRNGKey, B: int, d: int, n_active: jax.Array | int | None = None) -> chex.ArrayTree:
        return _per_prompt(lambda key: draw(key, d, n_active), key, B)

    return sample


def _gaussian_weight(key: chex.PRNGKey, d: int, n_active: jax.Array | int | None) -> dict[str, jax.Array]:
    return {"w": jax.random.normal(key, (d,), jnp.float32)}


def _inner(xs: jax.Array, w: jax.Array) -> jax.Array:
    """[B, K, d], [B or 1, d] -> [B, K]."""
    return jnp.matmul(xs, w[..., None], precision="highest")[..., 0]
