import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.core import UserError
from jaxlab.methods.in_context.backbones import (
    causal_linear_attention,
    gpt,
    gru,
    linear_attention,
    looped,
    lstm,
    selective_scan,
    state_space,
)

N, T = 8, 6
BACKBONES = {
    "gpt": gpt(n_embd=N, n_layer=2, n_head=2, n_positions=3),
    "gpt_rotary": gpt(n_embd=N, n_layer=1, n_head=2, positions="rotary"),
    "linear_attention": linear_attention(n_embd=N, n_layer=2, n_head=2, n_positions=3, mlp=False),
    "lstm": lstm(n_embd=N, n_layer=2),
    "gru": gru(n_embd=N, n_layer=2),
    "state_space": state_space(n_embd=N, n_layer=2, n_state=3),
    "looped": looped(gpt(n_embd=N, n_layer=1, n_head=2, n_positions=3), loops=3),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_variables(module):
    """Variables far from where they start, so that every path carries much; nothing is compiled for them."""
    shapes = jax.eval_shape(
        functools.partial(module.init, train=False), jax.random.key(0), jnp.zeros((2, T, N))
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(leaf.dtype), shapes)


@pytest.fixture(params=BACKBONES)
def backbone(request):
    module = BACKBONES[request.param]
    assert module.n_embd == N
    return module, random_variables(module)


def test_each_output_depends_on_its_token_and_those_before_it_alone(backbone):
    module, variables = backbone

    @jax.jit
    def influence(x):
        """[T, T]: how much output t moves with token s."""
        jacobian = jax.jacrev(lambda x: module.apply(variables, x[None], train=True)[0])(x)
        return jnp.abs(jacobian).sum((1, 3))

    moved = np.asarray(influence(normal(0, T, N)))
    assert np.isfinite(moved).all()
    np.testing.assert_array_equal(np.triu(moved, 1), 0)
    assert (moved[np.tril_indices(T)] > 0).all()


def test_a_shorter_sequence_has_the_outputs_of_the_longer_ones_beginning_also_under_vmap(backbone):
    module, variables = backbone
    x = normal(0, 2, T, N)
    apply = functools.partial(module.apply, train=False)
    replicas = jax.tree.map(lambda p: np.stack([p, 0.5 * p]), variables)
    outputs, others = jax.jit(jax.vmap(apply, (0, None)))(replicas, x)
    assert outputs.shape == x.shape
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(jax.jit(apply)(variables, x[:, :3]), outputs[:, :3], atol=1e-5)
    assert np.abs(others - outputs).max() > 1e-3


def test_linear_attention_is_the_mean_of_what_was_seen_in_float64():
    q, k, v = (normal(i, 2, 4, 3, 5) for i in range(3))
    expected = np.zeros_like(v, dtype=np.float64)
    for t in range(4):
        for s in range(t + 1):
            score = np.float64(q[:, t] * k[:, s]).sum(-1, keepdims=True) / np.sqrt(5)
            expected[:, t] += score * v[:, s] / (t + 1)
    np.testing.assert_allclose(causal_linear_attention(q, k, v), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_trained_linear_attention_is_one_step_of_gradient_descent():
    """von Oswald et al. (arXiv 2212.07677): ŷ = (1/N) Σ_j (z_jᵀ A z_q)(z_jᵀ v) on tokens z_j = (x_j, y_j)."""
    d, num_examples = 5, 10

    def prompts(key, batch_size):
        weights_key, inputs_key = jax.random.split(key)
        w = jax.random.normal(weights_key, (batch_size, d))
        xs = jax.random.uniform(inputs_key, (batch_size, num_examples + 1, d), minval=-1, maxval=1)
        ys = jnp.einsum("bkd,bd->bk", xs, w)
        return xs, ys, jnp.concatenate([xs, ys.at[:, -1].set(0)[..., None]], axis=-1)

    def predict(params, tokens):
        queries = (tokens @ params["A"])[:, :, None] * (d + 1) ** 0.5
        attended = causal_linear_attention(queries, tokens[:, :, None], tokens[:, :, None])
        return (num_examples + 1) / num_examples * attended[:, -1, 0] @ params["v"]

    optimizer = optax.adam(1e-3)
    a_key, v_key, key, test_key = jax.random.split(jax.random.key(0), 4)
    params = {"A": jax.random.normal(a_key, (d + 1, d + 1)), "v": jax.random.normal(v_key, (d + 1,))}
    params = jax.tree.map(lambda x: 0.02 * x, params)

    @jax.jit
    def train(params):
        def step(carry, i):
            params, opt_state = carry
            _, ys, tokens = prompts(jax.random.fold_in(key, i), 512)
            gradient = jax.grad(lambda params: jnp.mean((predict(params, tokens) - ys[:, -1]) ** 2))(params)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(6000))[0][0]

    xs, ys, tokens = prompts(test_key, 10_240)
    predictions, target = predict(train(params), tokens), ys[:, -1]
    step = jnp.einsum("bkd,bk,bd->b", xs[:, :-1], ys[:, :-1], xs[:, -1])
    step *= jnp.sum(step * target) / jnp.sum(step**2)  # the best rate
    error = jnp.mean((step - target) ** 2)
    np.testing.assert_allclose(jnp.mean((predictions - target) ** 2), error, rtol=0.01)
    assert error < 0.4 * jnp.mean(target**2)
    assert jnp.corrcoef(predictions, step)[0, 1] > 0.999


def test_selective_scan_is_its_recurrence_in_float64():
    batch, width, states = 2, 3, 4
    u, b, c = normal(0, batch, T, width), normal(1, batch, T, states), normal(2, batch, T, states)
    delta, a = np.exp(normal(3, batch, T, width)), -np.exp(normal(4, width, states))
    h, expected = np.zeros((batch, width, states)), []
    for t in range(T):
        step = np.float64(delta[:, t, :, None])
        h = np.exp(step * a) * h + step * u[:, t, :, None] * b[:, t, None]
        expected.append((h * c[:, t, None]).sum(-1))
    np.testing.assert_allclose(selective_scan(u, delta, a, b, c), np.stack(expected, 1), rtol=1e-4, atol=1e-5)


def test_state_spaces_forget_slowly_at_first():
    @jax.jit  # only the leaves that are returned are compiled
    def init(key):
        params = state_space(n_embd=32, n_layer=4).init(key, jnp.zeros((1, 2, 32)), train=False)["params"]
        layer = params["layer_0"]
        return layer["dt_proj"]["bias"], layer["log_a"], layer["out_proj"]["kernel"]

    bias, log_a, out = init(jax.random.key(0))
    steps = np.logaddexp(0, bias)
    assert 0.001 <= steps.min() < 0.01 < steps.max() <= 0.1
    np.testing.assert_allclose(np.exp(log_a[5]), np.arange(1, 17), rtol=1e-5)
    np.testing.assert_allclose(np.std(out), 1 / np.sqrt(3 * 64 * 4), rtol=0.1)


def test_looping_has_the_parameters_of_one_block_and_feeds_the_input_to_each_loop():
    block = gpt(n_embd=N, n_layer=1, n_head=2, n_positions=3)
    x, variables = normal(0, 1, T, N), random_variables(looped(block, loops=3))
    once = jax.jit(functools.partial(block.apply, {"params": variables["params"]["block"]}, train=False))
    z = np.zeros_like(x)
    for _ in range(3):
        z = once(z + x)
    outputs = jax.jit(functools.partial(looped(block, loops=3).apply, train=False))(variables, x)
    np.testing.assert_allclose(outputs, z, atol=1e-4)


def test_the_fused_kernel_is_refused_in_float32():
    with pytest.raises(UserError, match="'cudnn' needs dtype='bfloat16'"):
        gpt(n_embd=N, n_layer=1, n_head=2, attention="cudnn")
