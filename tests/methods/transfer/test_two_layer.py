"""The linear theory in float64: exact invariants, closed forms, and the two predictions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.methods.transfer import theory
from jaxlab.methods.transfer import two_layer as tl

SIZES = dict(d=12, m=6, k=2, n=10)
EPS = 0.4


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


make = jax.jit(functools.partial(tl.make_two_layer_problem, **SIZES))


@functools.cache
def problem(seed=0, eps=EPS):
    return jax.device_get(make(jax.random.key(seed), eps=eps))


@functools.partial(jax.jit, static_argnames=("method", "train_features"))
def _flow(v, B, X, Y, dt, num_steps, method, train_features):
    """As `run_flow`, but for any number of steps compiled once."""

    def step(i, layers):
        return tl.gradient_flow_step(*layers, X, Y, dt, method, train_features)

    return jax.lax.fori_loop(0, num_steps, step, (v, B))


def flow(v, B, p, dt=0.02, method="euler", train_features=True, num_steps=400):
    return jax.device_get(_flow(v, B, p.X, p.Y, dt, num_steps, method, train_features))


def loss_and_errors(v, B, p):
    error = B.T @ v - p.w_star
    return np.sum((p.X @ error) ** 2), np.sum((p.F.T @ error) ** 2), np.sum(error**2)


def random_head(seed=1, size=SIZES["k"]):
    return np.random.default_rng(seed).normal(size=size)


def test_a_problem_is_what_it_says():
    p = problem()
    k, m = SIZES["k"], SIZES["m"]
    assert all(leaf.dtype == np.float64 for leaf in p)
    for basis in (p.F.T, p.B_star, p.B0):
        np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-13)
    assert np.linalg.matrix_rank(p.X) == m
    np.testing.assert_allclose(p.X @ p.F @ p.F.T, p.X, atol=1e-13)  # its rows lie in S
    np.testing.assert_allclose(p.Y, p.X @ p.B_star.T @ p.v_star, atol=1e-13)
    distance, U = tl.feature_distance(p.B0, p.B_star)
    np.testing.assert_allclose(distance, EPS, atol=1e-13)
    np.testing.assert_allclose(U @ U.T, np.eye(k), atol=1e-13)
    np.testing.assert_allclose(np.linalg.norm(p.v_star), 1)


@pytest.mark.parametrize("eps", [0.0, 1.0, 2**0.5])
def test_the_distance_is_exact_up_to_its_ends(eps):
    p = problem(3, eps)
    np.testing.assert_allclose(tl.feature_distance(p.B0, p.B_star)[0], eps, atol=1e-7 if eps == 0 else 1e-12)
    np.testing.assert_allclose(p.B0 @ p.B0.T, np.eye(2), atol=1e-13)


def test_no_rotation_brings_the_features_nearer_than_procrustes():
    p = problem()
    distance, _ = tl.feature_distance(p.B0, p.B_star)
    for t in np.linspace(0, 2 * np.pi, 50):
        c, s = np.cos(t), np.sin(t)
        for U in (np.array([[c, -s], [s, c]]), np.array([[c, s], [s, -c]])):
            assert np.linalg.norm(p.B0 - U @ p.B_star, 2) >= distance - 1e-12


def test_a_step_is_the_gradient_of_the_sum_of_squares():
    p, v = problem(), random_head()
    loss = jax.value_and_grad(tl.two_layer_loss, argnums=(0, 1))
    value, (dv, dB) = loss(v, p.B0, p.X, p.Y)
    residual = np.array([v @ p.B0 @ x - y for x, y in zip(p.X, p.Y)])
    np.testing.assert_allclose(value, np.sum(residual**2), rtol=1e-13)
    after = tl.gradient_flow_step(v, p.B0, p.X, p.Y, 0.1)
    np.testing.assert_allclose(after[0], v - 0.1 * dv, rtol=1e-12)
    np.testing.assert_allclose(after[1], p.B0 - 0.1 * dB, rtol=1e-12)
    kept = tl.gradient_flow_step(v, p.B0, p.X, p.Y, 0.1, "rk4", train_features=False)
    np.testing.assert_array_equal(kept[1], p.B0)
    with pytest.raises(UserError, match="'heun'"):
        tl.gradient_flow_step(v, p.B0, p.X, p.Y, 0.1, "heun")


def test_runge_kutta_is_of_order_four():
    p, v = problem(), random_head()

    def at_one(num_steps, method):
        return flow(v, p.B0, p, dt=1 / num_steps, method=method, num_steps=num_steps)[0]

    exact = at_one(512, "rk4")
    errors = {m: [np.linalg.norm(at_one(n, m) - exact) for n in (16, 32)] for m in ("rk4", "euler")}
    assert 13 < errors["rk4"][0] / errors["rk4"][1] < 19
    assert 1.7 < errors["euler"][0] / errors["euler"][1] < 2.5


@pytest.mark.parametrize(("method", "dt"), [("euler", 0.05), ("rk4", 0.05)])
def test_features_off_the_subspace_are_frozen_to_machine_precision(method, dt):
    p = problem()
    _, B = flow(random_head(), p.B0, p, dt=dt, method=method)
    off = np.random.default_rng(2).normal(size=(5, SIZES["d"]))
    off -= off @ p.F @ p.F.T
    np.testing.assert_allclose(B @ off.T, p.B0 @ off.T, atol=1e-13)
    assert np.linalg.norm((B - p.B0) @ p.F) > 0.05  # and those on it are not


def test_the_flow_keeps_the_balance_to_machine_precision_and_descent_to_first_order():
    p, v = problem(), random_head()
    before = tl.balance(v, p.B0)

    def drift(method, dt, num_steps):
        after = tl.balance(*flow(v, p.B0, p, dt=dt, method=method, num_steps=num_steps))
        return np.abs(after - before).max()

    assert drift("rk4", 0.0005, 2000) < 1e-13
    coarse, fine = drift("euler", 0.02, 100), drift("euler", 0.01, 200)
    assert coarse > 1e-4
    assert 1.8 < coarse / fine < 2.2
    # The velocity itself is tangent to it: d/dt (vvᵀ - BBᵀ) = 0 at any point.
    _, tangent = jax.jvp(
        lambda t: tl.balance(*tl.gradient_flow_step(v, p.B0, p.X, p.Y, t)),
        (jnp.float64(0),),
        (jnp.float64(1),),
    )
    np.testing.assert_allclose(tangent, 0, atol=1e-13)


def test_the_head_bounds_the_error_at_every_time():
    p = problem()
    distance, U = tl.feature_distance(p.B0, p.B_star)
    off = np.linalg.svd(p.F)[0][:, SIZES["m"] :]
    cosine = tl.cos_theta_max(p.B0.T, off)
    for num_steps in (0, 3, 50, 400):
        v, B = flow(random_head(), p.B0, p, num_steps=num_steps)
        error = np.linalg.norm(B.T @ v - p.w_star)
        assert (
            cosine * np.linalg.norm(v - U @ p.v_star) <= error + distance * np.linalg.norm(p.v_star) + 1e-12
        )


def test_probing_by_descent_ends_at_the_closed_form_whose_error_is_the_identity():
    p = problem()
    v_lp = tl.lp_closed_form(p.X, p.B0, p.Y)
    np.testing.assert_allclose(v_lp, np.linalg.lstsq(p.X @ p.B0.T, p.Y)[0], rtol=1e-11)
    v, B = flow(random_head(), p.B0, p, dt=0.1, train_features=False, num_steps=4000)
    np.testing.assert_allclose(v, v_lp, atol=1e-10)
    np.testing.assert_array_equal(B, p.B0)
    distance, U = tl.feature_distance(p.B0, p.B_star)
    e = p.w_star - p.B0.T @ U @ p.v_star
    assert np.linalg.norm(e) <= distance + 1e-12
    np.testing.assert_allclose(tl.lp_error(p.X, p.B0, e), p.B0.T @ v_lp - p.w_star, atol=1e-13)


def test_a_run_is_its_steps_with_metrics_before_each_and_after_the_last():
    p, v = problem(), random_head()
    run = functools.partial(tl.run_flow, w_star=p.w_star, F=p.F, num_steps=4)
    end_v, end_B, metrics = jax.jit(run)(v, p.B0, p.X, p.Y, 0.02)
    along = [flow(v, p.B0, p, num_steps=i) for i in range(5)]
    np.testing.assert_allclose(metrics, [loss_and_errors(*layers, p) for layers in along], rtol=1e-11)
    np.testing.assert_allclose(end_v, along[-1][0], rtol=1e-12)
    np.testing.assert_allclose(end_B, along[-1][1], atol=1e-14)


def test_with_perfect_features_only_the_probed_head_stays_without_error():
    p = problem(seed=4, eps=0.0)
    assert max(loss_and_errors(*flow(tl.lp_closed_form(p.X, p.B0, p.Y), p.B0, p), p)) < 1e-25
    loss, _, ood_error = loss_and_errors(*flow(random_head(), p.B0, p, num_steps=8000), p)
    assert loss < 1e-12 < 1e-3 < ood_error


def test_angles_and_alignment():
    # Planes that share one axis and are t apart in the other.
    t = 0.3
    A = np.eye(4)[:, :2]
    T = np.stack([np.eye(4)[0], np.cos(t) * np.eye(4)[1] + np.sin(t) * np.eye(4)[2]], axis=1)
    np.testing.assert_allclose(tl.cos_theta_max(A, T), np.cos(t), rtol=1e-14)
    assert tl.head_alignment_error(np.array([0.0, 2.0]), np.array([0.0, 1.0])) == 3
    assert tl.head_alignment_error(np.array([5.0, -1.0]), np.array([0.0, 1.0])) == 0  # -ṽ is as good


@pytest.mark.parametrize(
    ("changed", "message"),
    [(dict(k=6), "k < m"), (dict(m=10), "m < d - k"), (dict(n=5), "n is 5"), (dict(eps=1.5), "eps is 1.5")],
)
def test_impossible_problems_are_refused(changed, message):
    with pytest.raises(UserError, match=message):
        tl.make_two_layer_problem(jax.random.key(0), **{**SIZES, "eps": 0.1, **changed})


@pytest.mark.slow
def test_both_predictions_hold_over_seeds_in_one_vmapped_program_without_x64_around_it():
    settings = dict(distances=(0.0, 0.2, 1.0), alphas=(0.0, 0.5, 1.0), head_stds=(1.0, 0.1))
    method = theory.theory(**settings, **SIZES, learning_rate=0.05, num_steps=3000)
    with jax.enable_x64(False):
        keys = jax.random.split(jax.random.key(0), 20)
        state = jax.vmap(method.init, (0, None))(keys, {})
        updated, metrics = jax.jit(jax.vmap(method.update, (0, None, 0)))(state, {}, keys)
        assert metrics["loss"].dtype == np.float32
        found = jax.device_get(updated.variables["params"])
        evaluator = theory.errors(**settings)
        values = evaluator.evaluate(method.predict, jax.tree.map(lambda x: x[3], updated))
    assert np.quantile(found["ft_loss"], 0.25) < 1e-20  # no float32 gets there
    ood = found["ft_error"][..., 1].mean(0)  # [σ, α, ε]
    assert (np.diff(ood[0], axis=0) < 0).all()  # a better head
    ratio = found["lp_error"][:, :, 1].mean(0) / ood[0, 0]
    assert (np.diff(ratio) > 0).all()  # better features favour LP
    small_head = ood[1, 0]
    lp = found["lp_error"][:, :, 1].mean(0)
    assert lp[1] < small_head[1]
    assert lp[2] > small_head[2]  # the crossover
    assert values["distance_0.2/lp_ood_error"] == found["lp_error"][3, 1, 1]
    assert values["distance_1/small_head_ft_ood_error"] == found["ft_error"][3, 1, 0, 2, 1]
    summary = {name: {"mean": value, "stderr": 0 * value} for name, value in values.items()}
    assert set(evaluator.plot(summary)) == {"ood_error"}


def test_the_experiment_needs_both_ends_of_the_heads():
    with pytest.raises(UserError, match=r"0\.0 \(FT\) and 1\.0"):
        theory.theory(distances=(0.1,), alphas=(0.5,))
