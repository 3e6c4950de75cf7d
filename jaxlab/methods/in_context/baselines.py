"""The algorithms that in-context learners are compared with: each learns from a prompt by itself.

Shivam Garg, Dimitris Tsipras, Percy Liang, Gregory Valiant. *What Can Transformers Learn In-Context? A Case
Study of Simple Function Classes*. NeurIPS 2022 (arXiv 2208.01066). Official code: dtsip/in-context-learning.

A baseline is `predict(xs, ys) -> preds`, [B, K, d], [B, K] -> [B, K]: prediction i is made at x_i from the
first i pairs of its prompt only, and is 0 for i = 0 (`discrete_mmse`: the prior mean). With a third argument,
query [B, K, d], prediction i is made at query i from the same pairs. All prefixes are one compiled call, in
which the pairs that a prefix does not have are zeros. Matrix products have the highest
precision, whatever the accelerator's default. Gradients flow to the query, and into the context of all but
`newton`, `lasso` and `network_gd`. Only `greedy_tree` and `boosting` run on the host, in scikit-learn, and
cannot be traced.

Where the paper and its code differ, or theirs and ours:

- Least squares is by singular values: the driver that the official code defaults to fails on the rank
  deficient prompts that a curriculum over dimensions makes.
- The official Lasso stops at scikit-learn's default tolerance, far from the optimum for alpha <= 1e-3.
- Only the paper has trees on the signs of the inputs, and the depths and rates of its boosted trees.

Some baselines are of later papers: `ridge` and `discrete_mmse`, the Bayes estimators of a Gaussian and of a
finite prior over tasks, of Raventós et al., *Pretraining Task Diversity and the Emergence of Non-Bayesian
In-Context Learning for Regression* (NeurIPS 2023); `newton` of Fu et al., *Transformers Learn to Achieve
Second-Order Convergence Rates for In-Context Linear Regression* (NeurIPS 2024); `gradient_descent` of von
Oswald et al., *Transformers Learn In-Context by Gradient Descent* (ICML 2023).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from threadpoolctl import threadpool_limits

from jaxlab.core import UserError
from jaxlab.metrics.reductions import masked_mean

Baseline = Callable[..., jax.Array]  # xs [B, K, d], ys [B, K], query=None [B, K, d] -> preds [B, K]


def _each_prefix(estimate: Callable[..., jax.Array], key: chex.PRNGKey | None = None) -> Baseline:
    """Vectorises `estimate(xs, ys, query, count)` over prompts, and runs it for every prefix in turn.

    Of `xs` [K, d] and `ys` [K] the first `count` rows are the context, the others are zero; `query` is [d].
    With a key, `estimate` is given one more argument, a key of its own for each prompt and prefix.
    """

    @jax.jit
    def predict(xs: jax.Array, ys: jax.Array, query: jax.Array | None = None) -> jax.Array:
        query = xs if query is None else query
        chex.assert_rank(xs, 3)
        chex.assert_equal_shape([xs, query])
        chex.assert_shape(ys, xs.shape[:2])

        def at(count: jax.Array) -> jax.Array:
            seen = jnp.arange(ys.shape[1]) < count
            keys = () if key is None else (jax.random.split(jax.random.fold_in(key, count), len(ys)),)
            preds = jax.vmap(lambda xs, ys, query, *key: estimate(xs, ys, query, count, *key))(
                jnp.where(seen[:, None], xs, 0), jnp.where(seen, ys, 0), query[:, count], *keys
            )
            return jnp.where(count > 0, preds, 0)

        with jax.default_matmul_precision("highest"):
            return jax.lax.map(at, jnp.arange(ys.shape[1])).T

    return predict


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{name}: expected a number above 0, got {value}.")


def _cutoff(xs: jax.Array) -> float:
    """What a singular value counts as zero at or below, relative to the largest one."""
    return max(xs.shape) * float(jnp.finfo(xs.dtype).eps)


def least_squares() -> Baseline:
    """Least squares of minimum norm, x_q' X^+ y.

    Singular values up to eps max(K, d) times the largest count as zero. Gradients are those at constant
    rank, finite for any prompt.
    """

    def estimate(xs: jax.Array, ys: jax.Array, query: jax.Array, count: jax.Array) -> jax.Array:
        return query @ (jnp.linalg.pinv(xs, rtol=_cutoff(xs)) @ ys)

    return _each_prefix(estimate)


def ridge(*, lam: float) -> Baseline:
    """Ridge regression, the minimiser of |y - Xw|^2 + lam |w|^2, sums over the examples.

    Solved by QR of X above sqrt(lam) I, whose condition number is the square root of that of the normal
    equations.

    Raises:
      UserError: `lam` not above 0; for 0 there is `least_squares`.
    """
    _check_positive(lam=lam)

    def estimate(xs: jax.Array, ys: jax.Array, query: jax.Array, count: jax.Array) -> jax.Array:
        q, r = jnp.linalg.qr(jnp.concatenate([xs, lam**0.5 * jnp.eye(xs.shape[1], dtype=xs.dtype)]))
        return query @ jax.scipy.linalg.solve_triangular(r, q[: len(ys)].T @ ys)

    return _each_prefix(estimate)


def bayes_ridge(*, sigma: float, tau: float = 1.0) -> Baseline:
    """Ridge with lam = sigma^2 / tau^2: the posterior mean for w ~ N(0, tau^2 I) and noise N(0, sigma^2).

    Raises:
      UserError: `sigma` or `tau` not above 0. Without noise, `least_squares` is the posterior mean.
    """
    _check_positive(sigma=sigma, tau=tau)
    return ridge(lam=(sigma / tau) ** 2)


def averaging() -> Baseline:
    """x_q' w with w = (1/i) sum_j y_j x_j, the estimate of least squares for a known identity covariance."""

    def estimate(xs: jax.Array, ys: jax.Array, query: jax.Array, count: jax.Array) -> jax.Array:
        return query @ (xs.T @ ys) / jnp.maximum(count, 1)

    return _each_prefix(estimate)


def gradient_descent(*, steps: int, lr: float, reduction: Literal["mean", "sum"] = "mean") -> Baseline:
    """Gradient descent on half the squared error of a linear model, from w = 0.

    w <- w - lr X'(Xw - y) / i for the mean over the examples, as in von Oswald et al.; without the 1 / i for
    their sum, as in Fu et al. One step with rate 1 on the mean is `averaging`. It diverges, and ends in
    NaN after enough steps, where lr is above 2 over the largest eigenvalue of X'X / i (or X'X).

    Raises:
      UserError: `steps` or `lr` not above 0, or unknown `reduction`.
    """
    if reduction not in ("mean", "sum"):
        raise UserError(f"reduction: expected 'mean' or 'sum', got {reduction!r}.")
    _check_positive(steps=steps, lr=lr)

    def estimate(xs: jax.Array, ys: jax.Array, query: jax.Array, count: jax.Array) -> jax.Array:
        rate = lr / jnp.maximum(count, 1) if reduction == "mean" else lr
        start = jnp.zeros_like(query)
        w = jax.lax.fori_loop(0, steps, lambda _, w: w - rate * (xs.T @ (xs @ w - ys)), start)
        return query @ w

    return _each_prefix(estimate)


def newton(*, steps: int) -> Baseline:
    """Newton's iteration for the inverse of A = X'X: M_0 = A / |AA'|_F, M <- M (2I - AM), w = MX'y.

    It converges to `least_squares`, the relative error along each eigenvector being squared every step. Fu et
    al. allow any M_0 = a A with a below 2 / |AA'|_2.

    Raises:
      UserError: `steps` not above 0.
    """
    _check_positive(steps=steps)

    def estimate(xs: jax.Array, ys: jax.Array, query: jax.Array, count: jax.Array) -> jax.Array:
        xs, ys = jax.lax.stop_gradient((xs, ys))
        # M is a polynomial in A, so that 1 - M's eigenvalue times A's is squared every step. The iteration
        # on matrices would double the rounding errors in A's null space instead.
        u, s, vt = jnp.linalg.svd(xs, full_matrices=False)
        kept = s > _cutoff(xs) * s[0]
        s = jnp.where(kept, s, 1)
        squares = jnp.where(kept, (s / s[0]) ** 4, 0)  # of A's eigenvalues, relative to the largest
        log_residual = jnp.exp2(steps) * jnp.log1p(-squares / jnp.sqrt(jnp.maximum(jnp.sum(squares**2), 1)))
        inverse = jnp.where(kept, -jnp.expm1(log_residual) / s, 0)
        return (vt @ query * inverse) @ (u.T @ ys)

    return _each_prefix(estimate)


def lasso(*, alpha: float, tol: float = 1e-6, max_iter: int = 10_000) -> Baseline:
    """The minimiser of |y - Xw|^2 / 2i + alpha |w|_1, without an intercept, by FISTA with restarts.

    Beck & Teboulle (2009), momentum restarted where it points uphill (O'Donoghue & Candès, 2015). Prompts of
    few examples need the most iterations, the more the smaller `alpha`.

    Args:
      alpha: weight of the L1 norm; the paper shows 0.01.
      tol: iterations of a prompt end once its duality gap is at most `tol` |y|^2 / i, as in scikit-learn,
        whose default is 1e-4. Rounding in float32 leaves gaps of up to 5e-7.
      max_iter: the most iterations.

    Raises:
      UserError: an argument not above 0.
    """
    _check_positive(alpha=alpha, tol=tol, max_iter=max_iter)

    def estimate(xs: jax.Array, ys: jax.Array, query: jax.Array, count: jax.Array) -> jax.Array:
        xs, ys = jax.lax.stop_gradient((xs, ys))
        count = jnp.maximum(count, 1)
        curvature = jnp.linalg.norm(xs, ord=2) ** 2 / count
        rate = 1 / jnp.where(curvature > 0, curvature, 1)

        def unconverged(state: tuple) -> jax.Array:
            *_, gap, iteration = state
            return (gap > tol * (ys @ ys) / count) & (iteration < max_iter)

        def iterate(state: tuple) -> tuple:
            w, ahead, momentum, _, iteration = state
            residual = ys - xs @ ahead
            correlation = xs.T @ residual / count
            # The gap between `ahead`, which `new` improves on, and the dual point s * residual: a sum of
            # terms that are not negative, where the difference of the two objectives would cancel.
            s = alpha / jnp.maximum(jnp.max(jnp.abs(correlation)), alpha)
            gap = (1 - s) ** 2 * (residual @ residual) / (2 * count)
            gap += jnp.sum(alpha * jnp.abs(ahead) - s * ahead * correlation)

            moved = ahead + rate * correlation
            new = jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - rate * alpha, 0)
            momentum = jnp.where((ahead - new) @ (new - w) > 0, 1, momentum)
            next_momentum = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
            return new, new + (momentum - 1) / next_momentum * (new - w), next_momentum, gap, iteration + 1

        start, one = jnp.zeros_like(query), jnp.ones((), query.dtype)
        w, *_ = jax.lax.while_loop(unconverged, iterate, (start, start, one, jnp.inf * one, 0))
        return query @ w

    return _each_prefix(estimate)


def knn(*, k: int = 3, weights: Literal["uniform", "distance"] = "uniform") -> Baseline:
    """The mean label of the min(i, k) nearest examples, in Euclidean distance; ties: the earlier one.

    Args:
      k: number of neighbours.
      weights: "uniform", which all published curves have, or "distance", 1 / distance. Where the query is
        among the examples, the weights are 1 for its copies and 0 for others.

    Raises:
      UserError: `k` not above 0, or unknown `weights`.
    """
    if weights not in ("uniform", "distance"):
        raise UserError(f"weights: expected 'uniform' or 'distance', got {weights!r}.")
    _check_positive(k=k)

    def estimate(xs: jax.Array, ys: jax.Array, query: jax.Array, count: jax.Array) -> jax.Array:
        squared = jnp.where(jnp.arange(len(ys)) < count, jnp.sum((xs - query) ** 2, axis=-1), jnp.inf)
        negated, nearest = jax.lax.top_k(-squared, min(k, len(ys)))
        squared = -negated
        weight = jnp.ones_like(squared)
        if weights == "distance":
            same = squared == 0
            inverse = 1 / jnp.sqrt(jnp.where(same, 1, squared))
            weight = jnp.where(jnp.any(same), same, inverse)
        weight = jnp.where(jnp.arange(len(nearest)) < count, weight, 0)
        return weight @ ys[nearest] / jnp.where(count > 0, jnp.sum(weight), 1)

    return _each_prefix(estimate)


def discrete_mmse(*, pool: jax.Array, sigma: float) -> Baseline:
    """The posterior mean for y = w'x + N(0, sigma^2) with w uniform on a pool of tasks.

    A softmax of the tasks' Gaussian log-likelihoods weights their outputs. Its memory is B M numbers.

    Args:
      pool: [M, d], the tasks w.
      sigma: standard deviation of the noise.

    Raises:
      UserError: `sigma` not above 0.
    """
    _check_positive(sigma=sigma)

    @jax.jit
    def predict(pool: jax.Array, xs: jax.Array, ys: jax.Array, query: jax.Array | None = None) -> jax.Array:
        query = xs if query is None else query
        chex.assert_equal_shape([xs, query])
        chex.assert_shape(pool, (None, xs.shape[2]))
        chex.assert_shape(ys, xs.shape[:2])

        def step(log_likelihood: jax.Array, point: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            x, y, query = point
            pred = jnp.sum(jax.nn.softmax(log_likelihood) * (query @ pool.T), axis=-1)
            log_likelihood -= ((y[:, None] - x @ pool.T) / sigma) ** 2 / 2
            # Relative to the likeliest task's, so that sums over long prompts stay exact.
            return log_likelihood - jnp.max(log_likelihood, axis=-1, keepdims=True), pred

        with jax.default_matmul_precision("highest"):
            uniform = jnp.zeros((len(xs), len(pool)), xs.dtype)
            return jax.lax.scan(step, uniform, (xs.swapaxes(0, 1), ys.T, query.swapaxes(0, 1)))[1].T

    return functools.partial(predict, jnp.asarray(pool))


def init_two_layer_network(key: chex.PRNGKey, d: int, hidden: int) -> dict[str, dict[str, jax.Array]]:
    """`kernel` and `bias` of the layers `hidden` and `readout`, U(±1 / sqrt(fan_in)) as in PyTorch."""

    def linear(key: chex.PRNGKey, fan_in: int, fan_out: int) -> dict[str, jax.Array]:
        kernel_key, bias_key = jax.random.split(key)
        draw = functools.partial(jax.random.uniform, minval=-(fan_in**-0.5), maxval=fan_in**-0.5)
        return {"kernel": draw(kernel_key, (fan_in, fan_out)), "bias": draw(bias_key, (fan_out,))}

    hidden_key, readout_key = jax.random.split(key)
    return {"hidden": linear(hidden_key, d, hidden), "readout": linear(readout_key, hidden, 1)}


def two_layer_network(params: dict[str, dict[str, jax.Array]], xs: jax.Array) -> jax.Array:
    """Linear, ReLU, linear; [..., d] -> [...]."""
    features = jax.nn.relu(xs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return (features @ params["readout"]["kernel"] + params["readout"]["bias"])[..., 0]


def network_gd(
    *, hidden: int = 100, steps: int = 100, lr: float = 5e-3, batch_size: int = 100, seed: int = 0
) -> Baseline:
    """A two-layer ReLU network trained by Adam on the context, a new one for each prompt and prefix.

    The defaults are the released code's. The paper: 5000 steps on batches of 10, lr 5e-3, or 5e-2 for linear
    functions. The official loss is a mean over prompts too, here it is each network's own; Adam does not
    see the factor.

    Args:
      hidden: width.
      steps: of Adam.
      lr: its learning rate.
      batch_size: examples a step, drawn without replacement; a context that is not larger is used whole.
      seed: of the initial weights and the batches, the same ones at every call.

    Raises:
      UserError: an argument not above 0, other than `seed`.
    """
    _check_positive(hidden=hidden, steps=steps, lr=lr, batch_size=batch_size)
    optimizer = optax.adam(lr)

    def loss(params: chex.ArrayTree, xs: jax.Array, ys: jax.Array, seen: jax.Array) -> jax.Array:
        return masked_mean((two_layer_network(params, xs) - ys) ** 2, seen)

    def estimate(
        xs: jax.Array, ys: jax.Array, query: jax.Array, count: jax.Array, key: chex.PRNGKey
    ) -> jax.Array:
        xs, ys = jax.lax.stop_gradient((xs, ys))
        init_key, batch_key = jax.random.split(key)
        params = init_two_layer_network(init_key, xs.shape[1], hidden)

        def step(index: int, state: tuple) -> tuple:
            params, opt_state = state
            seen = jnp.arange(len(ys)) < count
            batch = xs, ys, seen
            if batch_size < len(ys):
                order = jax.random.uniform(jax.random.fold_in(batch_key, index), (len(ys),))
                _, drawn = jax.lax.top_k(jnp.where(seen, order, -1), batch_size)
                batch = xs[drawn], ys[drawn], seen[drawn]
            gradient = jax.grad(loss)(params, *batch)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return optax.apply_updates(params, updates), opt_state

        params, _ = jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))
        return two_layer_network(params, query)

    return _each_prefix(estimate, jax.random.key(seed))


def _each_prefix_on_host(regressor: Callable[[], Any], sign: bool) -> Baseline:
    """`regressor()` is a new scikit-learn estimator, fitted to one prefix of one prompt."""

    def predict(xs: jax.Array, ys: jax.Array, query: jax.Array | None = None) -> np.ndarray:
        query = xs if query is None else query
        xs, query = (np.sign(x) if sign else np.asarray(x) for x in (xs, query))
        ys = np.asarray(ys)
        preds = np.zeros_like(ys)
        with threadpool_limits(1):  # a fit is too small to share
            for b, i in np.ndindex(ys.shape):
                if i > 0:
                    preds[b, i] = regressor().fit(xs[b, :i], ys[b, :i]).predict(query[b, i : i + 1])[0]
        return preds

    return predict


def greedy_tree(*, max_depth: int | None = None, sign: bool = False, random_state: int = 0) -> Baseline:
    """scikit-learn's regression tree, grown greedily. Runs on the host.

    Args:
      max_depth: None: until every leaf is pure. The paper reports 2, and 4 on signs; its code has 4 and None.
      sign: whether inputs are replaced by their signs, which decide the paper's decision trees.
      random_state: which of equally good splits is taken.
    """
    from sklearn.tree import DecisionTreeRegressor  # a second to import

    return _each_prefix_on_host(
        lambda: DecisionTreeRegressor(max_depth=max_depth, random_state=random_state), sign
    )


def boosting(
    *, n_estimators: int = 50, max_depth: int = 4, learning_rate: float = 0.1, sign: bool = False
) -> Baseline:
    """Gradient boosted trees with the objective of XGBoost, by scikit-learn. Runs on the host.

    `HistGradientBoostingRegressor` with XGBoost's leaves: L2 penalty 1, a single example allowed. It starts
    from the mean label, as XGBoost does from version 2. The defaults are the paper's, whose code has those of
    the library: 100 trees of depth 6, rate 0.3.

    Args:
      n_estimators: number of trees.
      max_depth: of each.
      learning_rate: shrinkage of each.
      sign: whether inputs are replaced by their signs.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor  # a second to import

    return _each_prefix_on_host(
        lambda: HistGradientBoostingRegressor(
            max_iter=n_estimators,
            max_depth=max_depth,
            learning_rate=learning_rate,
            l2_regularization=1.0,
            min_samples_leaf=1,
            max_leaf_nodes=None,
            early_stopping=False,
        ),
        sign,
    )
