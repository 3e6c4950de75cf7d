import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Lasso, LinearRegression, Ridge
from sklearn.neighbors import KNeighborsRegressor

from jaxlab.core import UserError
from jaxlab.methods.in_context.baselines import (
    averaging,
    bayes_ridge,
    boosting,
    discrete_mmse,
    gradient_descent,
    greedy_tree,
    init_two_layer_network,
    knn,
    lasso,
    least_squares,
    network_gd,
    newton,
    ridge,
)

B, K, D = 4, 9, 4
RNG = np.random.default_rng(0)
XS = RNG.normal(size=(B, K, D)).astype(np.float32)
YS = RNG.normal(size=(B, K)).astype(np.float32)
POOL = RNG.normal(size=(5, D)).astype(np.float32)

TRACED = {
    "least_squares": least_squares(),
    "ridge": ridge(lam=0.3),
    "averaging": averaging(),
    "gradient_descent": gradient_descent(steps=3, lr=0.1),
    "gradient_descent_sum": gradient_descent(steps=3, lr=0.05, reduction="sum"),
    "newton": newton(steps=4),
    "lasso": lasso(alpha=0.1, tol=1e-7),
    "knn": knn(k=3),
    "knn_distance": knn(k=3, weights="distance"),
    "discrete_mmse": discrete_mmse(pool=POOL, sigma=0.5),
    "network_gd": network_gd(hidden=6, steps=5, lr=0.05),
    "network_gd_batches": network_gd(hidden=6, steps=5, lr=0.05, batch_size=3),
}
HOST = {
    "greedy_tree": greedy_tree(max_depth=2),
    "boosting": boosting(n_estimators=3),
}


def _gradient_descent(x, y, query, lr):
    w = np.zeros(D)
    for _ in range(3):
        w -= lr * x.T @ (x @ w - y)
    return query @ w


def _newton(x, y, query, steps):
    gram = x.T @ x
    inverse = gram / np.linalg.norm(gram @ gram.T)
    for _ in range(steps):
        inverse = inverse @ (2 * np.eye(D) - gram @ inverse)
    return query @ inverse @ x.T @ y


def _lasso(x, y, query):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a gap of 1e-12 is below rounding
        model = Lasso(alpha=0.1, fit_intercept=False, tol=1e-12, max_iter=100_000)
        return model.fit(x, y).predict(query[None])[0]


def _knn(x, y, query, weights):
    distance = np.linalg.norm(x - query, axis=1)
    nearest = np.argsort(distance, kind="stable")[:3]
    w = np.ones(len(nearest)) if weights == "uniform" else 1 / distance[nearest]
    return w @ y[nearest] / w.sum()


def _scikit_learn_knn(x, y, query, weights):
    return KNeighborsRegressor(min(len(y), 3), weights=weights).fit(x, y).predict(query[None])[0]


def _discrete_mmse(x, y, query):
    likelihood = np.prod(np.exp(-((y - np.float64(POOL) @ x.T) ** 2) / (2 * 0.5**2)), axis=1)
    return likelihood / likelihood.sum() @ POOL @ query


REFERENCES = [
    ("least_squares", lambda x, y, q: q @ np.linalg.pinv(x) @ y),
    ("least_squares", lambda x, y, q: LinearRegression(fit_intercept=False).fit(x, y).coef_ @ q),
    ("ridge", lambda x, y, q: q @ np.linalg.solve(x.T @ x + 0.3 * np.eye(D), x.T @ y)),
    ("ridge", lambda x, y, q: Ridge(alpha=0.3, fit_intercept=False).fit(x, y).coef_ @ q),
    ("averaging", lambda x, y, q: q @ np.mean(x * y[:, None], axis=0)),
    ("gradient_descent", lambda x, y, q: _gradient_descent(x, y, q, 0.1 / len(y))),
    ("gradient_descent_sum", lambda x, y, q: _gradient_descent(x, y, q, 0.05)),
    ("newton", lambda x, y, q: _newton(x, y, q, 4)),
    ("lasso", _lasso),
    ("knn", lambda x, y, q: _knn(x, y, q, "uniform")),
    ("knn", lambda x, y, q: _scikit_learn_knn(x, y, q, "uniform")),
    ("knn_distance", lambda x, y, q: _knn(x, y, q, "distance")),
    ("knn_distance", lambda x, y, q: _scikit_learn_knn(x, y, q, "distance")),
    ("discrete_mmse", _discrete_mmse),
]


@pytest.mark.parametrize(("name", "reference"), REFERENCES)
def test_predictions_of_all_prefixes_are_those_of_a_float64_loop(name, reference):
    preds = np.asarray(TRACED[name](XS, YS))
    xs, ys = np.float64(XS), np.float64(YS)
    expected = [[reference(x[:i], y[:i], x[i]) for i in range(1, K)] for x, y in zip(xs, ys)]
    assert preds.shape == (B, K)
    assert preds.dtype == np.float32
    np.testing.assert_allclose(preds[:, 1:], expected, rtol=2e-4, atol=5e-4 if name == "lasso" else 2e-5)


@pytest.mark.parametrize("name", [*TRACED, *HOST])
def test_without_examples_the_prediction_is_zero_or_the_prior_mean(name):
    expected = XS[:, 0] @ POOL.mean(0) if name == "discrete_mmse" else np.zeros(B)
    np.testing.assert_allclose((TRACED | HOST)[name](XS, YS)[:, 0], expected, atol=1e-6)


@pytest.mark.parametrize("name", [*TRACED, *HOST])
def test_a_prediction_depends_on_the_pairs_before_it_and_its_query_only(name):
    predict, i = (TRACED | HOST)[name], 5
    before = np.asarray(predict(XS, YS))
    xs, ys = XS.copy(), YS.copy()
    xs[:, i + 1 :], ys[:, i:] = 100.0, -1e6
    np.testing.assert_array_equal(np.asarray(predict(xs, ys))[:, : i + 1], before[:, : i + 1])
    if name in TRACED:  # not even NaN passes
        xs[:, i + 1 :], ys[:, i:] = np.nan, np.nan
        np.testing.assert_array_equal(np.asarray(predict(xs, ys))[:, : i + 1], before[:, : i + 1])
    ys[:, : i + 1] = -YS[:, : i + 1]
    xs[:, : i + 1] = XS[:, : i + 1]
    assert np.all(np.asarray(predict(np.nan_to_num(xs), np.nan_to_num(ys)))[:, i] != before[:, i])


@pytest.mark.parametrize("name", TRACED)
def test_all_prefixes_are_one_compilation(name):
    predict = TRACED[name]
    predict(XS, YS)
    predict(2 * XS, -YS)
    assert getattr(predict, "func", predict)._cache_size() == 1


def _repeated(x):
    x = x.copy()
    x[:, 1::2] = x[:, :1]
    return x


DEGENERATE = {
    "zero inputs": (np.zeros_like(XS), YS),
    "zero labels": (XS, np.zeros_like(YS)),
    "truncated inputs": (XS * (np.arange(D) < 2), YS),
    "repeated inputs": (_repeated(XS), YS),
    "the same input": (np.broadcast_to(XS[:, :1], XS.shape), YS),
    "equal columns": (np.broadcast_to(XS[..., :1], XS.shape), YS),
    "orthonormal inputs": (np.broadcast_to(np.eye(K, D, dtype=np.float32), XS.shape), YS),
    "small inputs": (1e-12 * XS, YS),
    "large inputs": (1e3 * XS, 1e3 * YS),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", [*TRACED, *HOST])
def test_degenerate_prompts_have_finite_predictions(name, case):
    assert np.isfinite((TRACED | HOST)[name](*DEGENERATE[case])).all()


@pytest.mark.parametrize("name", [name for name in TRACED if name != "network_gd_batches"])
def test_gradients_are_finite_on_degenerate_prompts(name):
    prompts = [DEGENERATE[c] for c in DEGENERATE if c not in ("small inputs", "large inputs")]
    gradient = jax.jit(jax.grad(lambda xs, ys: TRACED[name](xs, ys).sum(), argnums=(0, 1)))
    for xs, ys in prompts:
        for g in gradient(xs, ys):
            assert np.isfinite(g).all()


@pytest.mark.parametrize(
    "name", ["least_squares", "ridge", "averaging", "newton", "lasso", "gradient_descent"]
)
def test_the_gradient_at_the_query_is_the_weight_vector(name):
    predict, i = TRACED[name], 6
    weights = jax.jit(jax.grad(lambda xs: predict(xs, YS)[:, i].sum()))(XS)[:, i]
    for scale in (1, -3):
        xs = XS.copy()
        xs[:, i] *= scale
        np.testing.assert_allclose(
            np.einsum("bd,bd->b", weights, xs[:, i]), predict(xs, YS)[:, i], rtol=1e-4, atol=1e-5
        )


def test_least_squares_has_the_gradient_of_its_float64_self_in_the_context():
    i, step = 6, 1e-6

    def value(x, y):
        return x[i] @ np.linalg.pinv(x[:i]) @ y[:i]

    gradient = jax.jit(jax.grad(lambda xs, ys: TRACED["least_squares"](xs, ys)[0, i], argnums=(0, 1)))
    for_xs, for_ys = gradient(XS, YS)
    x, y = np.float64(XS[0]), np.float64(YS[0])
    for row, column in ((0, 1), (4, 3)):
        up, down = x.copy(), x.copy()
        up[row, column] += step
        down[row, column] -= step
        slope = (value(up, y) - value(down, y)) / (2 * step)
        np.testing.assert_allclose(for_xs[0, row, column], slope, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(for_ys[0, :i], x[i] @ np.linalg.pinv(x[:i]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["least_squares", "ridge", "lasso", "averaging"])
def test_truncated_dimensions_count_for_nothing(name):
    xs = XS * (np.arange(D) < 2)
    reference = next(function for known, function in REFERENCES if known == name)
    x, y = np.float64(xs[0]), np.float64(YS[0])
    expected = [reference(x[:i], y[:i], x[i]) for i in range(1, K)]
    np.testing.assert_allclose(TRACED[name](xs, YS)[0, 1:], expected, rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize("steps", [60, 500])
def test_newton_converges_to_least_squares_and_stays_there_on_rank_deficient_prompts(steps):
    xs = _repeated(XS)
    expected = TRACED["least_squares"](xs, YS)
    np.testing.assert_allclose(newton(steps=steps)(xs, YS), expected, rtol=1e-3, atol=1e-4)


def test_averaging_is_one_step_of_rate_one_on_half_the_mean_squared_error():
    one_step = gradient_descent(steps=1, lr=1.0)(XS, YS)
    np.testing.assert_allclose(one_step, TRACED["averaging"](XS, YS), rtol=1e-5, atol=1e-6)


def test_bayes_ridge_has_the_penalty_of_the_noise_to_prior_ratio():
    np.testing.assert_allclose(
        bayes_ridge(sigma=0.5, tau=2.0)(XS, YS), ridge(lam=0.0625)(XS, YS), rtol=1e-5, atol=1e-6
    )


def test_ridge_with_a_vanishing_penalty_is_least_squares():
    ours = np.asarray(ridge(lam=1e-9)(XS, YS))
    np.testing.assert_allclose(ours, TRACED["least_squares"](XS, YS), rtol=5e-3, atol=5e-3)


def test_distance_weights_are_an_indicator_where_the_query_is_an_example():
    xs = np.array([[[0.0], [3.0], [0.0], [1.0], [0.0]]], np.float32)
    ys = np.array([[1.0, 10.0, 3.0, 20.0, 0.0]], np.float32)
    preds = knn(k=3, weights="distance")(xs, ys)[0]
    np.testing.assert_allclose(preds, [0, 1, 1, (1 + 10 / 2 + 3) / (1 + 1 / 2 + 1), 2], rtol=1e-6)


def test_of_neighbours_at_the_same_distance_the_earlier_ones_count():
    xs = np.array([[[1.0], [-1.0], [1.0], [-1.0], [0.0]]], np.float32)
    ys = np.array([[1.0, 2.0, 4.0, 8.0, 0.0]], np.float32)
    for weights in ("uniform", "distance"):
        np.testing.assert_allclose(knn(k=2, weights=weights)(xs, ys)[0, 4], 1.5, rtol=1e-6)


def test_more_neighbours_than_points_is_the_mean_label():
    preds = knn(k=50)(XS, YS)
    np.testing.assert_allclose(
        preds[:, 1:], [[y[:i].mean() for i in range(1, K)] for y in YS], rtol=1e-5, atol=1e-6
    )


def test_a_large_penalty_makes_the_lasso_exactly_zero():
    np.testing.assert_array_equal(lasso(alpha=100.0)(XS, YS), 0)


@pytest.mark.parametrize("alpha", [0.1, 0.01])
def test_lasso_has_the_error_of_scikit_learn_on_sparse_functions(alpha):
    rng = np.random.default_rng(1)
    xs = rng.normal(size=(3, 14, 6)).astype(np.float32)
    ys = (xs[..., 0] - 2 * xs[..., 3]).astype(np.float32)
    preds = lasso(alpha=alpha)(xs, ys)
    for i in (3, 6, 7, 13):
        for b in range(3):
            model = Lasso(alpha=alpha, fit_intercept=False, tol=1e-10, max_iter=100_000)
            expected = model.fit(np.float64(xs[b, :i]), ys[b, :i]).predict(xs[b, i : i + 1])[0]
            np.testing.assert_allclose(preds[b, i], expected, atol=5e-3)


def _prompts(seed: int, d: int, points: int, tasks: np.ndarray | None = None, sigma: float = 0.0):
    """1280 prompts of noisy linear functions, and the standard normal weights unless `tasks` are given."""
    rng = np.random.default_rng(seed)
    xs = rng.normal(size=(1280, points, d))
    w = rng.normal(size=(1280, d)) if tasks is None else tasks[rng.integers(0, len(tasks), 1280)]
    ys = np.einsum("bkd,bd->bk", xs, w) + sigma * rng.normal(size=(1280, points))
    return xs.astype(np.float32), ys.astype(np.float32)


def _mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5


def test_noise_free_errors_follow_their_closed_forms():
    d, points = 5, 12
    xs, ys = _prompts(1, d, points)
    i = np.arange(points)
    mean, error = _mean_and_error((np.float64(least_squares()(xs, ys)) - ys) ** 2 / d)
    np.testing.assert_array_less(np.abs(mean - np.maximum(1 - i / d, 0)), 4 * error + 1e-5)
    np.testing.assert_array_less(mean[d:], 1e-5)
    mean, error = _mean_and_error((np.float64(averaging()(xs, ys)) - ys) ** 2 / d)
    np.testing.assert_array_less(np.abs(mean - (d + 1) / np.maximum(i, 1))[1:], 4 * error[1:])


def test_noisy_least_squares_follows_its_closed_form_and_descends_twice():
    d, points, sigma = 8, 21, 1.0
    xs, ys = _prompts(2, d, points, sigma=sigma)
    ys = ys * np.float32(d**0.5 / ys.std(ddof=1))
    squared = (np.float64(least_squares()(xs, ys)) - ys) ** 2 / d
    i = np.arange(points)
    before, after = i <= d - 4, i >= d + 4  # closer to the peak the sampling error is itself unbounded
    with np.errstate(divide="ignore", invalid="ignore"):
        under = 1 - i / d + sigma**2 / d * (1 + i / (d - 1 - i))
        over = sigma**2 / d * (1 + d / (i - d - 1))
    expected = np.where(before, under, over) * d / (d + sigma**2)
    mean, error = _mean_and_error(squared)
    np.testing.assert_array_less(np.abs(mean - expected)[before | after], 4 * error[before | after])
    median = np.median(squared, axis=0)
    assert median[d] > 1.3 * median[d // 2]
    assert median[d] > 5 * median[-1]
    assert mean[d] > 5 * mean[0]


def test_each_bayes_estimator_is_the_best_on_its_own_prior():
    d, points, sigma = 4, 10, 0.5
    pool = np.random.default_rng(3).normal(size=(8, d)).astype(np.float32)
    mmse, bayes = discrete_mmse(pool=pool, sigma=sigma), bayes_ridge(sigma=sigma)
    for tasks, better, worse in ((pool, mmse, bayes), (None, bayes, mmse)):
        xs, ys = _prompts(4, d, points, tasks, sigma)
        excess = (np.asarray(worse(xs, ys)) - ys) ** 2 - (np.asarray(better(xs, ys)) - ys) ** 2
        mean, error = _mean_and_error(excess)
        np.testing.assert_array_less(-3 * error[1:], mean[1:])
        assert np.all(mean[3:6] > 5 * error[3:6])


def test_the_posterior_over_a_pool_stays_sharp_and_finite_over_a_long_prompt():
    rng = np.random.default_rng(5)
    pool = rng.normal(size=(20, 3)).astype(np.float32)
    xs = rng.normal(size=(2, 300, 3)).astype(np.float32)
    ys = xs @ pool[7]
    preds = np.asarray(discrete_mmse(pool=pool, sigma=1e-3)(xs, ys))
    np.testing.assert_allclose(preds[:, 5:], ys[:, 5:], atol=1e-4)


def _networks(seed: int, i: int, hidden: int) -> list:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i), B)
    return [init_two_layer_network(jax.random.split(key)[0], D, hidden) for key in keys]


def test_networks_are_those_that_torch_trains_from_the_same_initial_weights():
    torch = pytest.importorskip("torch")
    preds = TRACED["network_gd"](XS, YS)
    for i in (1, 4, 8):
        for b, params in enumerate(_networks(0, i, 6)):
            net = torch.nn.Sequential(torch.nn.Linear(D, 6), torch.nn.ReLU(), torch.nn.Linear(6, 1))
            with torch.no_grad():
                for linear, name in ((net[0], "hidden"), (net[2], "readout")):
                    linear.weight.copy_(torch.tensor(np.asarray(params[name]["kernel"]).T))
                    linear.bias.copy_(torch.tensor(np.asarray(params[name]["bias"])))
            optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
            x, y = torch.tensor(XS[b]), torch.tensor(YS[b])
            for _ in range(5):
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(net(x[:i])[:, 0], y[:i]).backward()
                optimizer.step()
            np.testing.assert_allclose(preds[b, i], net(x[i]).item(), rtol=1e-4, atol=1e-5)


def test_initial_weights_are_uniform_within_the_bounds_of_torch_and_differ_between_prompts():
    torch = pytest.importorskip("torch")
    params = init_two_layer_network(jax.random.key(0), 20, 400)
    for name, linear in (("hidden", torch.nn.Linear(20, 400)), ("readout", torch.nn.Linear(400, 1))):
        bound = linear.in_features**-0.5
        for ours, theirs in ((params[name]["kernel"].T, linear.weight), (params[name]["bias"], linear.bias)):
            assert ours.shape == theirs.shape
            assert np.abs(ours).max() <= bound
        np.testing.assert_allclose(params[name]["kernel"].std(), bound / 3**0.5, rtol=0.1)
        assert not np.any(np.isin(params[name]["bias"], params[name]["kernel"]))
    xs = np.broadcast_to(XS[:1], XS.shape)
    assert len(np.unique(TRACED["network_gd"](xs, np.zeros_like(YS))[:, 3])) == B


def test_a_context_that_fits_into_a_batch_is_used_whole_and_a_larger_one_is_not():
    whole, batches = (np.asarray(TRACED[name](XS, YS)) for name in ("network_gd", "network_gd_batches"))
    np.testing.assert_allclose(batches[:, :4], whole[:, :4], rtol=1e-4, atol=1e-5)
    assert np.all(np.abs(batches[:, 4:] - whole[:, 4:]) > 1e-6)


def test_a_full_tree_remembers_its_examples_and_signs_do_not_see_scale():
    xs = np.concatenate([XS, XS[:, 2:3]], axis=1)
    ys = np.concatenate([YS, YS[:, 2:3]], axis=1)
    np.testing.assert_array_equal(greedy_tree()(xs, ys)[:, -1], YS[:, 2])
    scale = np.float32([1, 20, 0.1, 5])
    for build in (greedy_tree, lambda sign: boosting(n_estimators=3, sign=sign)):
        np.testing.assert_array_equal(build(sign=True)(XS * np.abs(XS), YS), build(sign=True)(XS * scale, YS))
        assert np.any(build(sign=False)(XS, YS) != build(sign=True)(XS, YS))


def test_a_boosted_stump_has_the_leaves_of_xgboost():
    xs = np.array([[[0.0], [1.0], [2.0], [3.0], [2.5]]], np.float32)
    ys = np.array([[0.0, 0.0, 0.0, 8.0, 0.0]], np.float32)
    preds = boosting(n_estimators=1, max_depth=1, learning_rate=1.0)(xs, ys)
    # From the mean 2, the right leaf has the residual 6 of one example: 6 / (1 + 1); the left -6 / (3 + 1).
    assert preds[0, 4] in (np.float32(2 + 6 / 2), np.float32(2 - 6 / 4))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ridge(lam=0.0), "^lam: expected a number above 0, got 0.0"),
        (lambda: bayes_ridge(sigma=0.0), "^sigma: expected a number above 0"),
        (lambda: knn(k=0), "^k: expected a number above 0, got 0"),
        (lambda: knn(weights="gaussian"), "^weights: expected 'uniform' or 'distance', got 'gaussian'"),
        (lambda: gradient_descent(steps=0, lr=1.0), "^steps: expected"),
        (lambda: gradient_descent(steps=1, lr=1.0, reduction="max"), "^reduction: expected 'mean' or 'sum'"),
        (lambda: newton(steps=0), "^steps: expected"),
        (lambda: lasso(alpha=-1.0), "^alpha: expected"),
        (lambda: lasso(alpha=1.0, tol=float("nan")), "^tol: expected"),
        (lambda: discrete_mmse(pool=POOL, sigma=0.0), "^sigma: expected"),
        (lambda: network_gd(lr=0.0), "^lr: expected"),
    ],
)
def test_arguments_out_of_range_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_shapes_that_do_not_match_are_refused():
    for predict in (TRACED["least_squares"], TRACED["discrete_mmse"]):
        with pytest.raises(AssertionError):
            predict(XS, YS[:, :-1])


@pytest.mark.parametrize("name", ["least_squares", "knn", "lasso", "discrete_mmse"])
def test_batches_of_prompts_may_be_vectorised(name):
    twice = jax.vmap(TRACED[name])(jnp.stack([XS, 2 * XS]), jnp.stack([YS, -YS]))
    assert twice.shape == (2, B, K)
    np.testing.assert_allclose(twice[0], TRACED[name](XS, YS), rtol=1e-4, atol=1e-5)
