import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError, build
from jaxlab.nn.activations import LearnableShift, get, shifted
from jaxlab.nn.mlp import mlp

X = np.array([-30.0, -4.0, -2.9, -1.3, -0.6, -0.01, 0.02, 0.7, 1.4, 2.8, 5.0, 30.0])


def sech2(x):
    return 1 / np.cosh(x) ** 2


# Value and derivative in float64.
TABLE = {
    "relu": (np.maximum(X, 0), X > 0),
    "tanh": (np.tanh(X), sech2(X)),
    "lecun_tanh": (1.7159 * np.tanh(2 * X / 3), 1.7159 * 2 / 3 * sech2(2 * X / 3)),
    "softsign": (X / (1 + abs(X)), 1 / (1 + abs(X)) ** 2),
    "soft_sign": (X / (1 + abs(X)), 1 / (1 + abs(X)) ** 2),
    "hard_tanh": (np.clip(X, -1, 1), abs(X) < 1),
    "lecun_hard_tanh": (1.7159 * np.clip(2 * X / 3, -1, 1), 1.7159 * 2 / 3 * (abs(X) < 1.5)),
    "arctan": (np.arctan(X), 1 / (1 + X**2)),
    "sigmoid": (1 / (1 + np.exp(-X)), np.exp(-abs(X)) / (1 + np.exp(-abs(X))) ** 2),
    "hard_sigmoid": (np.clip(X + 3, 0, 6) / 6, (abs(X) < 3) / 6),
    "penalized_tanh": (np.where(X > 0, 1, 0.25) * np.tanh(X), np.where(X > 0, 1, 0.25) * sech2(X)),
    "shifted_tanh": (np.tanh(X + 1), sech2(X + 1)),
    "shifted_softsign": ((X + 1) / (1 + abs(X + 1)), 1 / (1 + abs(X + 1)) ** 2),
}


def value_and_derivative(f, x):
    return jax.vmap(jax.value_and_grad(f))(jnp.asarray(x, jnp.float32))


@pytest.mark.parametrize("name", TABLE)
def test_values_and_derivatives_are_those_of_the_table(name):
    value, derivative = value_and_derivative(get(name), X)
    np.testing.assert_allclose(value, TABLE[name][0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(derivative, TABLE[name][1], atol=1e-6)


def test_a_shift_moves_the_input_and_an_offset_the_output():
    for f, expected in (
        (get("shifted_tanh", shift=-2.0, offset=0.5), np.tanh(X - 2) + 0.5),
        (shifted(jnp.tanh, 0.5, -1.0), np.tanh(X + 0.5) - 1),
        (shifted("lecun_tanh", 1.0), 1.7159 * np.tanh(2 * (X + 1) / 3)),
        (shifted("tanh", 1.5, "origin"), np.tanh(X + 1.5) - np.tanh(1.5)),
    ):
        value, derivative = value_and_derivative(f, X)
        np.testing.assert_allclose(value, expected, atol=1e-6)
        assert np.isfinite(derivative).all()
    assert shifted("tanh", 1.5, "origin")(jnp.float32(0)) == 0
    per_channel = shifted("tanh", jnp.array([0.0, 1.0]))(jnp.zeros((3, 2)))
    np.testing.assert_allclose(per_channel, np.tile([0, np.tanh(1)], (3, 1)), rtol=1e-6)


def test_arguments_reach_the_function():
    assert get("leaky_relu", negative_slope=0.5)(jnp.float32(-2)) == -1
    np.testing.assert_allclose(
        get("penalized_tanh", slope=0.5)(jnp.float32(-2)), 0.5 * np.tanh(-2), rtol=1e-6
    )
    assert get(jnp.tanh) is jnp.tanh


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: get("rellu"), r"network\.activation: no 'rellu'\. Did you mean 'relu'\?"),
        (lambda: get("shifted_tan"), "no 'tan'. Did you mean 'tanh'"),
        (lambda: get("relu", slope=1.0), "'relu': .*'slope'"),
        (lambda: get("shifted_tanh", s=1.0), "'shifted_tanh': .*'s'"),
        (lambda: shifted("tanh", 1.0, "orign"), "activation.offset: expected a number or 'origin'"),
    ],
)
def test_what_there_is_not_is_the_users_error(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_learned_shift_has_the_gradient_summed_over_what_shares_it(per_channel):
    x = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32)
    weights = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    module = LearnableShift("tanh", init_shift=0.5, per_channel=per_channel)
    variables = module.init(jax.random.key(0), x)
    assert variables["params"]["shift"].shape == ((2,) if per_channel else ())
    gradient = jax.grad(lambda v: (module.apply(v, x) * weights).sum())(variables)["params"]["shift"]
    expected = (weights * sech2(x + 0.5)).sum((0, 1))
    np.testing.assert_allclose(gradient, expected if per_channel else expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(module.apply(variables, x), np.tanh(x + 0.5), atol=1e-6)


@pytest.mark.parametrize("norm", [None, "batch_norm"])
def test_a_config_names_shifted_activations_and_each_layer_learns_its_own(norm):
    x = np.ones((2, 3), np.float32)

    def network(activation):
        section = dict(name="mlp", num_classes=2, hidden=[4, 5], norm=norm, activation=activation)
        return build("network", section)

    def random(network, seed=0):
        rng = np.random.default_rng(seed)
        shapes = jax.eval_shape(network.init, jax.random.key(0), x)
        return jax.tree.map(lambda leaf: rng.uniform(0, 1, leaf.shape).astype(np.float32), shapes)

    fixed = network(dict(name="shifted", f="tanh", shift=1.0))
    learned = network(dict(name="LearnableShift", f="tanh", init_shift=1.0))
    plain = random(fixed)
    shifts = {f"shift{i}": {"shift": np.ones(3 + i, np.float32)} for i in (1, 2)}
    if norm:
        shifts = {f"norm{i}": {**plain["params"][f"norm{i}"], "shift": shifts[f"shift{i}"]} for i in (1, 2)}
    variables = {**plain, "params": plain["params"] | shifts}
    chex.assert_trees_all_equal_shapes(variables, random(learned))
    outputs = [net.apply(v, x, train=False)[0] for net, v in ((learned, variables), (fixed, plain))]
    np.testing.assert_allclose(*(out["logits"] for out in outputs), atol=1e-6)


def test_an_unknown_argument_of_an_activation_is_named_with_its_place():
    section = dict(name="mlp", num_classes=2, activation=dict(name="shifted", f="tanh", shfit=1.0))
    with pytest.raises(UserError, match=r"config\.network\.activation\.shfit: shifted\(\) takes no 'shfit'"):
        build("network", section)


def test_a_function_is_an_activation_too():
    network = mlp(2, hidden=(1,), activation=lambda x: 2 * x)
    layer = {"kernel": np.full((1, 1), 3.0, np.float32), "bias": np.ones(1, np.float32)}
    head = {"kernel": np.ones((1, 2), np.float32), "bias": np.zeros(2, np.float32)}
    variables = {"params": {"dense1": layer, "head": head}}
    outputs, _ = network.apply(variables, np.ones((1, 1), np.float32), train=False)
    np.testing.assert_array_equal(outputs["features"], [[8]])
