import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.methods.in_context.functions import (
    decision_tree,
    linear,
    linear_classification,
    logistic_loss,
    noisy_linear,
    quadratic,
    random_covariance_factor,
    relu_network,
    sample_gaussian_inputs,
    sign_accuracy,
    sparse_linear,
    squared_error,
    task_pool,
)

KEY = jax.random.key(0)
CLASSES = {
    "linear": linear(scale=0.5),
    "sparse_linear": sparse_linear(sparsity=3),
    "linear_classification": linear_classification(),
    "noisy_linear": noisy_linear(noise_std=0.5),
    "quadratic": quadratic(scale=2.0),
    "relu_network": relu_network(hidden=6, scale=3.0),
    "decision_tree": decision_tree(depth=3),
}


def _tree_label(params, j, x):
    node = 0
    for _ in range(3):
        node = 2 * node + (2 if x[params["coordinate"][j, node]] > 0 else 1)
    return params["value"][j, node]


# The label of one input x of prompt j, one number at a time.
LABELS = {
    "linear": lambda p, j, x: 0.5 * sum(w * v for w, v in zip(p["w"][j], x)),
    "sparse_linear": lambda p, j, x: sum(w * v for w, v in zip(p["w"][j], x)),
    "linear_classification": lambda p, j, x: np.sign(sum(w * v for w, v in zip(p["w"][j], x))),
    "quadratic": lambda p, j, x: 2 * sum(w * v * v for w, v in zip(p["w"][j], x)) / 3**0.5,
    "relu_network": lambda p, j, x: (
        3 * (2 / 6) ** 0.5 * sum(b * max(0, a @ x) for a, b in zip(p["w1"][j].T, p["w2"][j]))
    ),
    "decision_tree": _tree_label,
}


SAMPLE_INPUTS = jax.jit(sample_gaussian_inputs, static_argnums=(1, 2, 3))


def draw(function, B, K, d):
    """Functions and inputs; classes with equal parameters share their compiled programs."""
    xs = SAMPLE_INPUTS(jax.random.key(1), B, K, d)
    return jax.jit(function.sample, static_argnums=(1, 2))(jax.random.key(2), B, d), xs


def made_up(name, B, d):
    """Functions that are not drawn by the class."""
    rng = np.random.default_rng(0)
    if name == "decision_tree":
        return {
            "coordinate": rng.integers(0, d, (B, 15)).astype(np.int32),
            "value": rng.normal(size=(B, 15)).astype(np.float32),
        }
    if name == "relu_network":
        return {
            "w1": rng.normal(size=(B, d, 6)).astype(np.float32),
            "w2": rng.normal(size=(B, 6)).astype(np.float32),
        }
    return {"w": rng.normal(size=(B, d)).astype(np.float32)}


@pytest.mark.parametrize("name", LABELS)
def test_labels_agree_with_their_formula_one_point_at_a_time(name):
    evaluate = CLASSES[name].evaluate
    params = made_up(name, 4, 6)
    xs = np.random.default_rng(1).normal(size=(4, 5, 6)).astype(np.float32)
    xs[0, 0] = xs[:, :, 2] = 0  # a zero is not above the threshold and has sign 0
    expected = [[LABELS[name](params, j, x) for x in np.float64(xs[j])] for j in range(4)]
    shared = [[LABELS[name](params, 0, x) for x in np.float64(xs[j])] for j in range(4)]

    @jax.jit
    def labels(params, xs):
        first = jax.tree.map(lambda leaf: leaf[:1], params)
        two_batches = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (params, xs))
        return evaluate(params, xs), evaluate(first, xs), jax.vmap(evaluate)(*two_batches).reshape(4, 5)

    for ys, formula in zip(labels(params, xs), (expected, shared, expected)):
        assert ys.dtype == jnp.float32
        np.testing.assert_allclose(ys, formula, rtol=1e-5, atol=1e-5)


def test_every_part_of_a_tree_is_drawn_and_reached():
    function = decision_tree()
    params, xs = draw(function, 4096, 4, 6)
    assert params["coordinate"].shape == params["value"].shape == (4096, 31)
    frequency = np.bincount(np.ravel(params["coordinate"])) / params["coordinate"].size
    np.testing.assert_allclose(frequency, 1 / 6, rtol=0.05)
    ys = jax.jit(function.evaluate)(params, xs)
    node = np.argmax(ys[..., None] == params["value"][:, None], axis=-1)
    frequency = np.bincount(np.ravel(node), minlength=31) / node.size
    np.testing.assert_array_equal(frequency[:15], 0)
    assert np.all(frequency[15:] > 0.04)  # 1/16 if no coordinate came twice on a path


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (linear(), 6),
        (linear(scale=3.0), 54),
        (sparse_linear(sparsity=3), 3),
        (linear_classification(), 1),
        (noisy_linear(noise_std=2.0), 10),
        (noisy_linear(noise_std=2.0, renormalize=True), 6),
        (quadratic(), 6),
        (relu_network(), 6),
        (relu_network(hidden=4, scale=0.5), 1.5),
        (decision_tree(), 1),
    ],
)
def test_the_normalizer_is_the_mean_square_of_a_label(function, expected):
    assert function.normalizer(6) == pytest.approx(expected)
    params, xs = draw(function, 4096, 4, 6)
    ys = np.float64(jax.jit(function.evaluate)(params, xs, KEY))
    assert np.mean(ys**2) == pytest.approx(expected, rel=0.06)
    assert abs(np.mean(ys)) < 0.06 * expected**0.5


def test_inputs_are_scaled_then_shifted_then_zeroed():
    scale, bias = jnp.float32(np.random.default_rng(0).normal(size=(4, 4))), jnp.arange(4.0)
    plain = SAMPLE_INPUTS(KEY, 3, 5, 4)
    assert plain.dtype == jnp.float32
    xs = jax.jit(lambda n: sample_gaussian_inputs(KEY, 3, 5, 4, scale=scale, bias=bias, n_active=n))(2)
    expected = np.float64(plain) @ np.float64(scale) + np.float64(bias)
    expected[..., 2:] = 0
    np.testing.assert_allclose(xs, expected, rtol=1e-5, atol=1e-6)


def test_inputs_are_standard_normal_and_independent():
    xs = np.float64(SAMPLE_INPUTS(jax.random.key(1), 4096, 4, 6)).reshape(4096, 24)
    np.testing.assert_allclose(xs.mean(0), 0, atol=0.07)
    np.testing.assert_allclose(np.cov(xs.T), np.eye(24), atol=0.1)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_covariance_factor_has_the_eigenvalues_asked_for_in_a_random_basis(normalize):
    eigenvalues = 1 / np.arange(1, 6)
    factor = jax.jit(jax.vmap(lambda key: random_covariance_factor(key, jnp.float32(eigenvalues), normalize)))
    factors = factor(jax.random.split(KEY, 500))
    expected = eigenvalues * ((5 / np.sum(eigenvalues**2)) ** 0.5 if normalize else 1)
    found = np.linalg.eigvalsh(np.float64(factors))
    np.testing.assert_allclose(found, np.tile(expected[::-1], (500, 1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(factors, factors.mT, atol=1e-6)
    # No direction is preferred: the mean of t² is its trace over d times the identity.
    mean = np.mean(np.float64(factors @ factors), axis=0)
    np.testing.assert_allclose(mean, np.eye(5) * np.sum(expected**2) / 5, atol=0.1 * np.max(expected**2))


def test_sparse_functions_keep_random_coordinates_among_the_active_ones():
    sample = jax.vmap(lambda n: sparse_linear(sparsity=3).sample(KEY, 3000, 7, n))
    for active, w in zip((7, 5, 2), jax.jit(sample)(jnp.array([7, 5, 2]))["w"]):
        kept = min(active, 3)
        np.testing.assert_array_equal(np.sum(w != 0, axis=1), kept)
        frequency = np.mean(w != 0, axis=0)
        np.testing.assert_allclose(frequency, [kept / active] * active + [0] * (7 - active), atol=0.04)
        np.testing.assert_allclose(np.std(w[w != 0]), 1, atol=0.04)
    assert sparse_linear(sparsity=3).normalizer(2) == 2


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "sparse_linear"])
def test_only_the_sparse_class_heeds_the_active_coordinates(name):
    not_a_number = object()  # any use would fail
    jax.eval_shape(lambda: CLASSES[name].sample(KEY, 3, 5, not_a_number))
    with pytest.raises(TypeError):
        jax.eval_shape(lambda: CLASSES["sparse_linear"].sample(KEY, 3, 5, not_a_number))


def test_a_prompt_does_not_depend_on_how_many_are_drawn_with_it():
    zero = {"w": jnp.zeros((1, 4))}

    @jax.jit
    def prompts(key):
        return [
            {
                "inputs": sample_gaussian_inputs(key, B, 3, 4),
                "functions": sparse_linear().sample(key, B, 4),
                "members": task_pool(linear(), num_tasks=1000).sample(key, B, 4),
                "noise": noisy_linear().evaluate(zero, jnp.zeros((B, 3, 4)), key),
            }
            for B in (2, 5)
        ]

    for few, many in zip(*(jax.tree.leaves(part) for part in prompts(KEY))):
        np.testing.assert_allclose(few, many[:2], rtol=1e-6)
        assert len(np.unique(many.reshape(5, -1), axis=0)) == 5


@pytest.mark.parametrize("name", CLASSES)
def test_labels_are_computed_to_full_precision(name):
    xs = jnp.zeros((2, 3, 4))
    jaxpr = str(jax.make_jaxpr(CLASSES[name].evaluate)(made_up(name, 2, 4), xs, KEY))
    products = jaxpr.count("dot_general[")
    assert products == {"relu_network": 2, "decision_tree": 0}.get(name, 1)
    assert jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


def test_noise_is_on_every_label_and_of_its_own_key():
    zero, xs = {"w": jnp.zeros((1, 4))}, jnp.zeros((3000, 6, 4))
    noise = jax.jit(noisy_linear(noise_std=0.5).evaluate)
    noise = np.float64([noise(zero, xs, key) for key in (KEY, jax.random.key(1))])
    np.testing.assert_allclose(noise.std(axis=1), 0.5, rtol=0.1)
    np.testing.assert_allclose(np.corrcoef(noise[0].T), np.eye(6), atol=0.08)
    assert abs(np.corrcoef(noise.reshape(2, -1))[0, 1]) < 0.05


def test_renormalized_labels_have_the_deviation_of_noiseless_ones():
    params, xs = made_up("noisy_linear", 3, 5), np.random.default_rng(1).normal(size=(3, 4, 5))
    noisy, renormalized = jax.jit(
        lambda *args: [
            noisy_linear(noise_std=2.0, renormalize=flag).evaluate(*args) for flag in (False, True)
        ]
    )(params, np.float32(xs), KEY)
    noisy = np.float64(noisy)
    np.testing.assert_allclose(renormalized, noisy * 5**0.5 / noisy.std(ddof=1), rtol=1e-5)


def test_losses_and_metrics_are_those_of_each_point():
    preds = np.float32([[0.3, -2.0, 0.0, 5.0, 1.0]])
    ys = np.float32([[1, 1, -1, -1, 0]])
    np.testing.assert_allclose(squared_error(preds, ys), (preds - ys) ** 2, rtol=1e-6)
    sigmoid, target = 1 / (1 + np.exp(-np.float64(preds))), (ys + 1) / 2
    expected = -target * np.log(sigmoid) - (1 - target) * np.log(1 - sigmoid)
    np.testing.assert_allclose(logistic_loss(preds, ys), expected, rtol=1e-5)
    np.testing.assert_array_equal(sign_accuracy(preds, ys), [[1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(sign_accuracy(0 * preds, ys), [[0, 0, 0, 0, 1]])
    function = linear_classification()
    assert (function.loss, function.metric) == (logistic_loss, sign_accuracy)


def test_the_logistic_loss_of_certain_predictions_is_finite_and_so_is_its_gradient():
    preds, ys = jnp.float32([[1e4, 1e4, -1e4]]), jnp.float32([[1, -1, -1]])
    np.testing.assert_allclose(logistic_loss(preds, ys), [[0, 1e4, 0]])
    gradient = jax.grad(lambda p: jnp.sum(logistic_loss(p, ys)))(preds)
    np.testing.assert_allclose(gradient, [[0, 1, 0]], atol=1e-7)


def rows(params):
    return np.concatenate([np.reshape(leaf, (len(leaf), -1)) for leaf in jax.tree.leaves(params)], axis=1)


def test_every_function_of_a_batch_is_of_the_pool_which_never_changes():
    drawn, whole = (task_pool(decision_tree(depth=1), num_tasks=4, replace=flag) for flag in (True, False))
    sample = jax.jit(lambda key: (whole.sample(key, 4, 5), drawn.sample(key, 400, 5)))
    (pool, batch), (_, other_batch) = sample(KEY), sample(jax.random.key(1))
    assert (rows(batch) != rows(other_batch)).any()
    for params in (batch, other_batch):
        members, counts = np.unique(rows(params), axis=0, return_counts=True)
        assert len(members) == 4
        np.testing.assert_array_equal(members, np.unique(rows(pool), axis=0))
        np.testing.assert_allclose(counts, 100, atol=30)


def test_pools_of_one_seed_share_members_and_pools_of_two_seeds_none():
    pools = [task_pool(linear(), num_tasks=m, seed=s, replace=False) for m, s in [(5, 0), (8, 0), (8, 1)]]
    small, large, other = (
        rows(params)
        for params in jax.jit(lambda key: [pool.sample(key, m, 3) for pool, m in zip(pools, (5, 8, 8))])(KEY)
    )
    assert (small[:, None] == large).all(-1).any(1).all()
    assert not (other[:, None] == large).all(-1).any()


def test_without_replacement_a_batch_has_no_function_twice_and_orders_differ():
    pool = task_pool(linear(), num_tasks=9, replace=False)
    sample = jax.jit(lambda key: pool.sample(key, 6, 3))
    batches = [rows(sample(key)) for key in (KEY, jax.random.key(1))]
    assert all(len(np.unique(batch, axis=0)) == 6 for batch in batches)
    assert (batches[0] != batches[1]).any()


def test_a_pool_of_sparse_functions_follows_the_curriculum():
    pool = task_pool(sparse_linear(sparsity=2), num_tasks=16)
    w = np.asarray(jax.jit(lambda n: pool.sample(KEY, 32, 6, n))(3)["w"])
    np.testing.assert_array_equal(np.sum(w != 0, axis=1), 2)
    np.testing.assert_array_equal(w[:, 3:], 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sparse_linear(sparsity=0), "sparsity: "),
        (lambda: noisy_linear(noise_std=-1.0), "noise_std: "),
        (lambda: relu_network(hidden=0), "hidden: "),
        (lambda: decision_tree(depth=0), "depth: "),
        (lambda: task_pool(linear(), num_tasks=0), "num_tasks: "),
        (lambda: task_pool(linear(), num_tasks=3, replace=False).sample(KEY, 4, 2), "num_tasks: a pool of 3"),
    ],
)
def test_what_no_class_can_have_is_refused(call, message):
    with pytest.raises(UserError, match=f"^{message}"):
        call()
