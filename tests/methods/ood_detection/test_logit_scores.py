import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from jaxlab.methods.ood_detection.energy import maximum_softmax_probability
from jaxlab.methods.ood_detection.logit_scores import (
    entropy_score,
    fit_kl_matching,
    fit_temperature,
    gen_score,
    kl_matching_score,
    odin_perturb,
    odin_score,
    signed_step,
    temperature_score,
    uniform_xent_score,
)
from tests.methods.ood_detection.problem import CLASSES, F_TRAIN, FIT, LABELS, SCORED, F, lse, softmax

STATELESS = (entropy_score, uniform_xent_score, gen_score)
# Each compiled once, for logits of one shape.
COMPILED = {score: jax.jit(score) for score in STATELESS}
FIT_TEMPERATURE = jax.jit(fit_temperature)
ALL = jax.jit(lambda logits: [score(logits) for score in STATELESS])


def _gen(logits, gamma: float = 0.1, m: int = 100):
    """The authors' formula on probabilities in float64, with 1-p as a sum so that it is exact there too."""
    p = np.sort(softmax(logits.astype(np.float64)))[:, ::-1]
    q = np.stack([np.delete(p, c, axis=1).sum(1) for c in range(p.shape[1])], axis=1)
    return np.sum(p[:, :m] ** gamma * q[:, :m] ** gamma, axis=1)


REFERENCES = {
    entropy_score: lambda f: scipy.stats.entropy(softmax(f), axis=1),
    uniform_xent_score: lambda f: f.mean(1) - scipy.special.logsumexp(f, axis=1),
    gen_score: _gen,
}


@pytest.mark.parametrize("score", STATELESS)
def test_stateless_scores_equal_their_definition_with_and_without_jit(score):
    logits = SCORED[1]
    np.testing.assert_allclose(score(logits), REFERENCES[score](F), rtol=1e-5, atol=1e-5)
    for factor in (1, 30):
        compiled = COMPILED[score](np.float32(factor) * logits)
        np.testing.assert_allclose(compiled, REFERENCES[score](factor * F), rtol=1e-5, atol=1e-5)


def test_stateless_scores_reduce_the_last_axis_alone():
    for score, values in zip(STATELESS, ALL(SCORED[1].reshape(3, 11, 5))):
        np.testing.assert_allclose(values, REFERENCES[score](F).reshape(3, 11), rtol=1e-5, atol=1e-5)


def test_gen_takes_the_largest_probabilities_alone():
    scores = jax.jit(lambda logits: gen_score(logits, gamma=0.5, top_m=3))(SCORED[1])
    np.testing.assert_allclose(scores, _gen(F, 0.5, 3), rtol=1e-5)


EDGES = {  # logits: entropy, GEN
    (1e4, 0, 0): (0, 0),  # p = 1 and p = 0
    (0, -np.inf, -np.inf): (0, 0),
    (2, 2, -np.inf): (np.log(2), 2 * 0.25**0.1),
    (20, 0, 0): (42 * np.exp(-20), (2 * np.exp(-20)) ** 0.1 + 2 * np.exp(-20) ** 0.1),  # p rounds to 1
    (3, 3, 3): (np.log(3), 3 * (2 / 9) ** 0.1),
}


def test_values_at_probabilities_of_zero_and_one():
    entropies, _, gens = ALL(np.float32(list(EDGES)))
    np.testing.assert_allclose(entropies, [entropy for entropy, _ in EDGES.values()], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gens, [gen for _, gen in EDGES.values()], rtol=1e-5, atol=1e-6)


def test_every_score_is_larger_where_the_logits_say_less():
    for values in ALL(np.float32([[0.1, 0, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0], [6, 0, 0]])):
        assert np.all(np.diff(values) < 0)


def _nll(log_t, logits=F_TRAIN, labels=LABELS):
    f = logits / np.exp(log_t)
    return np.mean(scipy.special.logsumexp(f, axis=1) - f[np.arange(len(f)), labels])


@pytest.mark.parametrize("factor", [1.0, 50.0, 0.02])
def test_temperature_is_where_the_likelihood_is_greatest(factor):
    features, logits, labels, head = FIT
    temperature = FIT_TEMPERATURE(features, np.float32(factor) * logits, labels, head)["temperature"]
    best = np.exp(scipy.optimize.minimize_scalar(_nll, (-1, 1), tol=1e-12).x)
    np.testing.assert_allclose(temperature, factor * best, rtol=1e-4)
    scores = temperature_score({"temperature": temperature}, SCORED[0], np.float32(factor) * SCORED[1])
    np.testing.assert_allclose(scores, -softmax(F / best).max(1), rtol=1e-5)


@pytest.mark.slow  # many programs of one operation each to compile
def test_temperature_and_kl_matching_without_jit():
    compiled = FIT_TEMPERATURE(*FIT)["temperature"]
    np.testing.assert_allclose(fit_temperature(*FIT)["temperature"], compiled, rtol=1e-5)
    expected = _kl_matching(softmax(F), softmax(F_TRAIN))
    np.testing.assert_allclose(
        kl_matching_score(fit_kl_matching(*FIT), *SCORED), expected, rtol=1e-5, atol=1e-5
    )


def test_temperature_stays_finite_where_no_temperature_is_best():
    right = FIT_TEMPERATURE(FIT[0], 5 * np.eye(CLASSES, dtype=np.float32)[LABELS], LABELS, FIT[3])
    wrong = FIT_TEMPERATURE(FIT[0], -5 * np.eye(CLASSES, dtype=np.float32)[LABELS], LABELS, FIT[3])
    assert 0 < right["temperature"] < 0.1
    assert 1e3 < wrong["temperature"] < 1e5


def _kl_matching(p, p_fit):
    predicted = p_fit.argmax(1)
    templates = [
        p_fit[predicted == c].mean(0) if (predicted == c).any() else np.eye(CLASSES)[c]
        for c in range(CLASSES)
    ]
    return np.array([min(scipy.stats.entropy(row, template) for template in templates) for row in p])


FIT_KL, SCORE_KL = jax.jit(fit_kl_matching), jax.jit(kl_matching_score)


@pytest.mark.parametrize("never_predicted", [False, True])
def test_kl_matching_equals_its_definition(never_predicted):
    features, logits, labels, head = FIT
    if never_predicted:
        logits = logits - np.float32([0, 0, 40, 0, 0])
    expected = _kl_matching(softmax(F), softmax(logits.astype(np.float64)))
    compiled = SCORE_KL(FIT_KL(features, logits, labels, head), *SCORED)
    np.testing.assert_allclose(compiled, expected, rtol=1e-5, atol=1e-5)


def test_kl_matching_at_probabilities_of_zero():
    state = {"templates": np.float32([[1, 0, 0], [0.5, 0.5, 0]])}
    logits = np.float32([[0, -np.inf, -np.inf], [0, 0, -np.inf], [0, 0, 0]])
    np.testing.assert_allclose(SCORE_KL(state, logits, logits), [0, 0, np.inf], atol=1e-6)


STD = (0.5, 0.25, 2.0)


def _network(key=1):
    rng = np.random.default_rng(key)
    w1, w2 = rng.normal(size=(12, 9)), rng.normal(size=(9, 4))
    images = rng.normal(size=(6, 2, 2, 3))
    images[:, 0, 0, 0] = 0  # nothing depends on the first input: see its weights
    w1[0] = 0
    return w1, w2, images


def _odin_by_hand(w1, w2, images, temperature, epsilon):
    """The authors' steps in float64: the gradient of the mean loss, its sign, the step, the score."""

    def forward(x):
        hidden = np.maximum(x.reshape(len(x), -1) @ w1, 0)
        return hidden, hidden @ w2

    hidden, logits = forward(images)
    residual = softmax(logits / temperature) - np.eye(4)[logits.argmax(1)]
    gradient = (((residual / temperature / len(images)) @ w2.T) * (hidden > 0)) @ w1.T
    sign = np.where(gradient >= 0, 1.0, -1.0).reshape(images.shape)
    moved = images - epsilon * sign / np.array(STD)
    return moved, -softmax(forward(moved)[1] / temperature).max(1)


def _odin(variables, x, temperature, epsilon):
    def apply(variables, x):
        return jax.nn.relu(x.reshape(len(x), -1) @ variables[0]) @ variables[1]

    moved = odin_perturb(lambda x: apply(variables, x), x, temperature, epsilon, STD)
    return moved, odin_score(apply, variables, x, temperature, epsilon, STD)


ODIN = jax.jit(_odin)


@pytest.mark.parametrize(
    ("temperature", "epsilon", "function"),
    [
        (1000.0, 0.0014, ODIN),
        (1.0, 0.05, ODIN),
        pytest.param(1000.0, 0.0014, _odin, marks=pytest.mark.slow, id="without jit"),
    ],
)
def test_odin_equals_the_authors_procedure(temperature, epsilon, function):
    w1, w2, images = _network()
    expected_inputs, expected = _odin_by_hand(w1, w2, images, temperature, epsilon)
    variables = np.float32(w1), np.float32(w2)
    moved, scores = function(variables, np.float32(images), temperature, epsilon)
    np.testing.assert_allclose(moved, expected_inputs, atol=1e-6)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    np.testing.assert_allclose(moved[:, 0, 0, 0], -epsilon / STD[0], rtol=1e-6)  # a gradient of zero


def test_a_gradient_of_zero_counts_as_positive_and_the_step_is_in_units_before_normalisation():
    inputs = jnp.float32([[1, 2, 3]])
    moved = signed_step(lambda x: jnp.sum(x * jnp.float32([4, 0, -1e-30])), inputs, 0.5, STD)
    np.testing.assert_allclose(moved, [[1 - 1, 2 - 2, 3 + 0.25]])


def test_gradients_are_taken_in_full_precision():
    def loss(x):
        return jnp.sum(jnp.dot(x, jnp.ones((3, 2))))

    text = str(jax.make_jaxpr(lambda x: signed_step(loss, x, 0.1))(jnp.ones((2, 3))))
    assert text.count("HIGHEST") > 0
    assert "precision=None" not in text


def test_msp_is_the_energy_of_logits_whose_largest_is_zero():
    log_msp = np.log(-maximum_softmax_probability(SCORED[1]))
    np.testing.assert_allclose(log_msp, -lse(F) + F.max(1), atol=1e-5)  # E(f) + f_max
    np.testing.assert_allclose(log_msp, -lse(F - F.max(1, keepdims=True)), atol=1e-5)
