import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlab.core import UserError, build
from jaxlab.methods.in_context import prompts
from jaxlab.methods.in_context.functions import (
    linear,
    linear_classification,
    logistic_loss,
    noisy_linear,
    sparse_linear,
    squared_error,
)

KEY = jax.random.key(0)
DIMS = dict(start=2, end=4, inc=1, interval=2)
POINTS = dict(start=3, end=7, inc=2, interval=2)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def attend(matrix, xs, ys):
    """A causal predictor: ŷ_i = mean_{j<i} y_j tanh(x_jᵀ A x_i) + tanh(x_i)_0."""
    scores = jnp.tanh(jnp.einsum("bjd,de,bie->bij", xs, matrix, xs))
    earlier = jnp.tril(jnp.ones((xs.shape[1],) * 2), -1)
    examples = jnp.maximum(jnp.arange(xs.shape[1]), 1)
    return jnp.einsum("bij,ij,bj->bi", scores, earlier, ys) / examples + jnp.tanh(xs[..., 0])


predict = functools.partial(attend, normal(4, 4, seed=9))


def least_squares(xs, ys):
    seen = jnp.arange(xs.shape[1]) < jnp.arange(xs.shape[1])[:, None]
    inverse = jnp.linalg.pinv(jax.lax.stop_gradient(jnp.where(seen[None, ..., None], xs[:, None], 0)))
    return jnp.einsum("bid,bidj,bj->bi", xs, inverse, ys, precision="highest")


class OfficialCurriculum:
    """The official code's counter, which is updated after every step."""

    def __init__(self, start, end, inc, interval):
        self.value, self.end, self.inc, self.interval, self.count = start, end, inc, interval, 0

    def update(self):
        self.count += 1
        if self.count % self.interval == 0:
            self.value += self.inc
        self.value = min(self.value, self.end)


@pytest.mark.parametrize("schedule", [DIMS, POINTS, dict(start=1, end=9, inc=3, interval=5)])
def test_the_curriculum_agrees_with_the_official_counter_at_every_step(schedule):
    official, expected = OfficialCurriculum(**schedule), []
    for _ in range(30):
        expected.append(official.value)
        official.update()
    values = jax.jit(lambda steps: prompts.curriculum_value(steps, **schedule))(jnp.arange(30))
    assert values.dtype == jnp.int32
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize(
    ("start", "end", "inc", "values"),
    [
        (5, 20, 1, (5, 5, 6, 19, 20, 20)),
        (11, 41, 2, (11, 11, 13, 39, 41, 41)),
        (26, 101, 5, (26, 26, 31, 96, 101, 101)),
    ],
)
def test_the_curricula_of_the_paper_end_at_step_30000(start, end, inc, values):
    steps = np.array([0, 1999, 2000, 29_999, 30_000, 500_000])
    np.testing.assert_array_equal(prompts.curriculum_value(steps, start, end, inc, 2000), values)


@pytest.mark.parametrize("layout", ["shared", "own"])
def test_tokens_agree_with_their_definition_one_at_a_time(layout):
    xs, ys = normal(2, 3, 4), normal(2, 3, seed=1)
    width = {"shared": 4, "own": 5}[layout]
    expected = np.zeros((2, 6, width), np.float32)
    for b in range(2):
        for j in range(3):
            expected[b, 2 * j, width - 4 :] = xs[b, j]
            expected[b, 2 * j + 1, 0] = ys[b, j]
    np.testing.assert_array_equal(prompts.interleave(xs, ys, layout), expected)


def test_predictions_are_read_at_the_tokens_of_the_inputs():
    out = jnp.arange(12.0).reshape(2, 6, 1)
    np.testing.assert_array_equal(prompts.read_predictions(out), [[0, 2, 4], [6, 8, 10]])


@pytest.mark.parametrize("loss", [squared_error, logistic_loss])
def test_a_masked_prompt_has_the_loss_and_the_gradient_of_a_shorter_one(loss):
    matrix, xs, ys = normal(4, 4, seed=9), normal(3, 6, 4), np.sign(normal(3, 6, seed=1))

    def masked_loss(matrix, xs, ys, n_points):
        return prompts.prefix_loss(attend(matrix, xs, ys), ys, n_points, loss)

    masked = jax.jit(jax.value_and_grad(masked_loss))
    shorter = jax.jit(jax.value_and_grad(lambda matrix, xs, ys: jnp.mean(loss(attend(matrix, xs, ys), ys))))
    for n_points in (1, 4):
        expected = shorter(matrix, xs[:, :n_points], ys[:, :n_points])
        for given in (jnp.int32(n_points), jnp.full(3, n_points)):
            for a, b in zip(masked(matrix, xs, ys, given), expected):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert masked._cache_size() == 2  # a scalar and a vector, whatever their values


def stream(function=None, **changed):
    arguments = dict(batch_size=8, num_points=7, dimension=4, dims_curriculum=DIMS, points_curriculum=POINTS)
    return prompts.in_context_prompts(function or linear(), **{**arguments, **changed})


def test_batches_follow_the_curriculum_without_recompilation():
    calls = []

    def evaluate(params, xs, key=None):
        calls.append(None)
        return linear().evaluate(params, xs)

    function = sparse_linear(sparsity=2)._replace(evaluate=evaluate)
    batch_of = jax.jit(stream(function).batch)
    labels = []
    for step in range(8):
        batch = batch_of(step, KEY)
        n_dims, n_points = min(2 + step // 2, 4), min(3 + step // 2 * 2, 7)
        np.testing.assert_array_equal(batch["n_dims"], np.full(8, n_dims))
        np.testing.assert_array_equal(batch["n_points"], np.full(8, n_points))
        assert (batch["xs"].shape, batch["ys"].shape) == ((8, 7, 4), (8, 7))
        np.testing.assert_array_equal(batch["xs"][..., n_dims:], 0)
        assert np.all(batch["xs"][..., :n_dims] != 0)
        w = [
            np.linalg.lstsq(x, y, rcond=None)[0] for x, y in zip(*map(np.float64, (batch["xs"], batch["ys"])))
        ]
        np.testing.assert_array_equal(np.sum(np.abs(w) > 1e-4, axis=1), 2)  # both among the active ones
        labels.append(np.asarray(batch["ys"]))
    assert len(np.unique(labels, axis=0)) == 8
    assert len(calls) == 1


def test_prompts_do_not_depend_on_the_batch_size_nor_on_the_devices():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharded = jax.jit(stream().batch, out_shardings=NamedSharding(mesh, PartitionSpec("data")))(3, KEY)
    few, many = (jax.jit(stream(batch_size=size).batch)(3, KEY) for size in (2, 8))
    for name, column in many.items():
        np.testing.assert_allclose(few[name], column[:2], rtol=1e-6)
        np.testing.assert_allclose(sharded[name], column, rtol=1e-6)
    assert len(np.unique(many["ys"], axis=0)) == 8


def test_a_batch_is_that_of_its_step_and_replica_and_whole_without_curriculum():
    whole = stream(noisy_linear(), dims_curriculum=None, points_curriculum=None)
    keys = jax.random.split(KEY, 2)
    together = jax.jit(jax.vmap(whole.batch, (None, 0)))(5, keys)
    alone = jax.jit(whole.batch)
    for i, key in enumerate(keys):
        for name, column in alone(5, key).items():
            np.testing.assert_allclose(together[name][i], column, rtol=1e-5, atol=1e-6)
    assert (together["xs"][0] != together["xs"][1]).all()
    assert (alone(6, keys[0])["xs"] != together["xs"][0]).all()
    assert np.all(together["n_dims"] == 4)
    assert np.all(together["n_points"] == 7)
    assert np.all(together["xs"] != 0)


def test_fixed_prompts_come_again_with_their_noise_and_never_twice_in_a_batch():
    stream = prompts.in_context_prompts(
        noisy_linear(noise_std=0.5), batch_size=4, num_points=3, dimension=2, num_training_examples=6
    )
    batches = jax.jit(jax.vmap(stream.batch, (0, None)))(jnp.arange(40), KEY)
    assert batches["xs"].shape == (40, 4, 3, 2)
    rows = np.concatenate([batches["xs"].reshape(40, 4, -1), batches["ys"]], axis=-1)
    assert len(np.unique(rows.reshape(160, -1), axis=0)) == 6
    assert all(len(np.unique(batch, axis=0)) == 4 for batch in rows)
    _, counts = np.unique(rows.reshape(160, -1), axis=0, return_counts=True)
    assert counts.min() > 10
    other = stream.batch(0, jax.random.key(1))["xs"].reshape(4, -1)
    assert not np.isin(other, rows).any()


def test_a_config_names_the_class_of_its_prompts():
    section = dict(
        name="jaxlab.methods.in_context.prompts:in_context_prompts",
        function=dict(name="task_pool", function=dict(name="relu_network", hidden=3), num_tasks=4),
        num_points=5,
        dimension=4,
        dims_curriculum=DIMS,
    )
    batch = jax.eval_shape(build("data", section, batch_size=2).batch, jnp.int32(0), KEY)
    assert {name: column.shape for name, column in batch.items()} == {
        "xs": (2, 5, 4),
        "ys": (2, 5),
        "n_dims": (2,),
        "n_points": (2,),
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stream(dims_curriculum={**DIMS, "end": 5}), "dims_curriculum: .* at most 4"),
        (lambda: stream(points_curriculum={**POINTS, "interval": 0}), "points_curriculum: .* at least 1"),
        (
            lambda: stream(points_curriculum=dict(start=1, end=2)),
            "points_curriculum: expected start, end, inc",
        ),
        (lambda: stream(num_training_examples=1), "num_training_examples: 1 are fewer than a batch"),
        (
            lambda: stream(num_training_examples=9, dims_curriculum=DIMS),
            "num_training_examples: .* no curriculum",
        ),
        (lambda: prompts.interleave(normal(1, 2, 3), normal(1, 2), "both"), "layout: "),
        (lambda: prompts.orthants(query="same"), "query: "),
        (lambda: prompts.half_subspace()(KEY, normal(1, 2, 1)), "half_subspace: expected at least 2"),
    ],
)
def test_what_no_prompt_can_be_is_refused(call, message):
    with pytest.raises(UserError, match=f"^{message}"):
        call()


def test_standard_and_scaled_prompts():
    xs = jnp.asarray(normal(2, 3, 4))
    assert prompts.standard()(KEY, xs) == (xs, None)
    context, query = prompts.scale_x(factor=3.0)(KEY, xs)
    np.testing.assert_array_equal(context, 3 * xs)
    assert query is None
    context, query = prompts.scale_query(factor=0.5)(KEY, xs)
    np.testing.assert_array_equal(context, xs)
    np.testing.assert_array_equal(query, xs / 2)


@pytest.mark.parametrize(
    ("shift", "spectrum"),
    [(prompts.skewed(), 1 / np.arange(1, 7) ** 2), (prompts.half_subspace(), np.array([1, 1, 1, 0, 0, 0]))],
)
def test_shifted_covariances_have_their_spectrum_and_trace(shift, spectrum):
    xs = normal(4000, 2, 6)
    context, query = jax.jit(shift)(KEY, xs)
    assert query is None
    inputs = np.float64(context).reshape(-1, 6)
    eigenvalues = np.linalg.eigvalsh(inputs.T @ inputs / len(inputs))[::-1]
    np.testing.assert_allclose(eigenvalues, spectrum * 6 / spectrum.sum(), rtol=0.06, atol=1e-6)
    # One transformation for all prompts, in no special basis.
    transform, *_ = np.linalg.lstsq(np.float64(xs).reshape(-1, 6), inputs, rcond=None)
    assert np.max(np.abs(np.float64(xs).reshape(-1, 6) @ transform - inputs)) < 1e-4
    assert np.max(np.abs(transform - np.diag(np.diag(transform)))) > 0.1


@pytest.mark.parametrize("query_kind", ["different", "opposite"])
def test_examples_of_a_prompt_are_in_one_orthant_and_queries_are_not(query_kind):
    xs = normal(200, 4, 3)
    context, query = jax.jit(prompts.orthants(query=query_kind))(KEY, xs)
    np.testing.assert_array_equal(np.abs(context), np.abs(xs))
    signs = np.sign(context)
    np.testing.assert_array_equal(signs, np.broadcast_to(signs[:, :1], signs.shape))
    assert len(np.unique(signs[:, 0], axis=0)) == 8
    np.testing.assert_array_equal(query, xs if query_kind == "different" else -context)


@pytest.mark.parametrize("length", [3, 7])
def test_orthogonal_queries_agree_with_projections_one_at_a_time(length):
    xs = normal(3, length, 4)
    context, query = jax.jit(prompts.orthogonal_query())(KEY, xs)
    np.testing.assert_array_equal(context, xs)
    expected = np.zeros(xs.shape)
    for b in range(3):
        for i in range(min(length, 4)):
            x, before = np.float64(xs[b, i]), np.float64(xs[b, :i])
            residual = x - np.linalg.pinv(before) @ before @ x if i else x
            expected[b, i] = residual * np.linalg.norm(x) / np.linalg.norm(residual)
    np.testing.assert_allclose(query, expected, atol=2e-5)


def test_orthogonal_queries_of_dependent_examples_are_finite():
    xs = normal(2, 4, 4)
    xs[:, 2] = xs[:, 1]
    xs[:, 3] = 0
    query = np.float64(prompts.orthogonal_query()(KEY, xs)[1])
    np.testing.assert_allclose(np.einsum("bjd,bd->bj", xs[:, :2], query[:, 2]), 0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(query, axis=-1), np.linalg.norm(xs, axis=-1), rtol=1e-5)


def test_a_query_that_is_an_example_is_any_of_those_before_it():
    xs = normal(300, 4, 2)
    context, query = jax.jit(prompts.query_is_example())(KEY, xs)
    np.testing.assert_array_equal(context, xs)
    same = (query[:, :, None] == xs[:, None]).all(-1)  # [B, query, example]
    np.testing.assert_array_equal(same.sum(-1), 1)
    expected = [[1, 0, 0, 0], [1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0]]
    np.testing.assert_allclose(same.mean(0), expected, atol=0.1)


@pytest.mark.parametrize("function", [linear(), linear_classification(), noisy_linear(renormalize=True)])
def test_prefix_errors_agree_with_the_official_loop(function):
    params = {"w": normal(3, 4, seed=2)}
    context, query = normal(3, 5, 4), normal(3, 5, 4, seed=1)
    expected = np.zeros((3, 5))
    for i in range(5):
        xs = np.concatenate([context[:, :i], query[:, i:]], axis=1)
        ys = function.evaluate(params, xs, KEY)
        expected[:, i] = function.metric(predict(xs, ys), ys)[:, i]
    errors = jax.jit(functools.partial(prompts.prefix_errors, predict, function))
    np.testing.assert_allclose(errors(params, context, query, key=KEY), expected, rtol=1e-4, atol=1e-5)
    # A causal predictor needs one call where the queries are the next examples.
    ys = function.evaluate(params, context, KEY)
    alone = errors(params, context, key=KEY)
    np.testing.assert_allclose(alone, function.metric(predict(context, ys), ys), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(errors(params, context, context, key=KEY), alone, rtol=1e-4, atol=1e-5)


def test_the_prediction_for_an_orthogonal_query_by_least_squares_is_zero():
    params, (context, query) = {"w": normal(4, 3)}, prompts.orthogonal_query()(KEY, normal(4, 3, 3, seed=1))
    errors = prompts.prefix_errors(least_squares, linear(), params, context, query)
    np.testing.assert_allclose(errors, linear().evaluate(params, query) ** 2, rtol=1e-3, atol=1e-4)


def test_aggregated_errors_agree_with_a_literal_bootstrap():
    errors, n_boot = normal(11, 3) ** 2, 40
    means = []
    for key in jax.random.split(KEY, n_boot):
        rows = np.asarray(jax.random.randint(key, (11,), 0, 11))
        means.append([np.mean([errors[row, k] for row in rows], dtype=np.float64) for k in range(3)])
    means = np.sort(means, axis=0)
    result = jax.jit(prompts.aggregate, static_argnums=2)(errors, KEY, n_boot)
    expected = {
        "mean": errors.mean(0),
        "std": np.std(np.float64(errors), axis=0, ddof=1),
        "low": means[2],
        "high": means[38],
    }
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-5)


def test_the_bootstrap_interval_covers_the_mean_nine_times_in_ten():
    samples = normal(300, 40, 1) + 1
    result = jax.jit(jax.vmap(lambda errors: prompts.aggregate(errors, KEY, 200)))(samples)
    covered = (result["low"] <= 1) & (result["high"] >= 1)
    assert 0.84 < np.mean(covered) < 0.95


def test_least_squares_is_aligned_with_the_projection_even_of_dependent_examples():
    xs, w = normal(3, 7, 5), normal(3, 5, seed=1)
    xs[..., 4] = 0
    xs[:, 3] = xs[:, 1]
    xs[:, 0] = 0
    ys = linear().evaluate({"w": w}, xs)
    cosines = jax.jit(functools.partial(prompts.gradient_alignment, least_squares))(xs, ys, w)
    np.testing.assert_allclose(cosines, [[0, 0, 1, 1, 1, 1, 1]] * 3, atol=1e-4)


def test_gradient_alignment_agrees_with_its_definition_one_at_a_time():
    xs, w = normal(2, 6, 4), normal(2, 4, seed=1)
    ys = linear().evaluate({"w": w}, xs)
    cosines = jax.jit(functools.partial(prompts.gradient_alignment, predict))(xs, ys, w)
    jacobian = np.float64(jax.jit(jax.jacobian(predict))(xs, ys))  # [prompt, output, prompt, input, d]
    for b in range(2):
        assert cosines[b, 0] == 0
        for i in range(1, 6):
            gradient, before = jacobian[b, i, b, i], np.float64(xs[b, :i])
            projection = np.linalg.pinv(before) @ before @ w[b]
            expected = gradient @ projection / np.linalg.norm(gradient) / np.linalg.norm(projection)
            np.testing.assert_allclose(cosines[b, i], expected, atol=1e-4)
