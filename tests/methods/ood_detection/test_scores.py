import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError, build
from jaxlab.methods.ood_detection import (
    activation_shaping,
    feature_scores,
    logit_scores,
    neighbor_scores,
    scores,
)
from jaxlab.methods.ood_detection import energy as free_energy
from jaxlab.methods.ood_detection.activation_shaping import linear
from jaxlab.nn.mlp import mlp
from tests.methods.ood_detection.problem import DATA, FIT, H_TRAIN, SCORED, B, F, H, W, lse, softmax

STATELESS = {
    scores.maximum_softmax_probability: free_energy.maximum_softmax_probability,
    scores.max_logit: free_energy.max_logit,
    scores.energy: free_energy.energy,
    scores.entropy: logit_scores.entropy_score,
    scores.uniform_cross_entropy: logit_scores.uniform_xent_score,
    scores.gen: logit_scores.gen_score,
}
FITTED = {
    scores.temperature_scaled: (logit_scores.fit_temperature, logit_scores.temperature_score),
    scores.kl_matching: (logit_scores.fit_kl_matching, logit_scores.kl_matching_score),
    scores.mahalanobis: (feature_scores.fit_mahalanobis, feature_scores.mahalanobis_score),
    scores.relative_mahalanobis: (
        feature_scores.fit_relative_mahalanobis,
        feature_scores.relative_mahalanobis_score,
    ),
    scores.knn: (neighbor_scores.fit_knn, neighbor_scores.knn_score),
    scores.nnguide: (neighbor_scores.fit_nnguide, neighbor_scores.nnguide_score),
    scores.vim: (feature_scores.fit_vim, feature_scores.vim_score),
    scores.residual: (feature_scores.fit_residual, feature_scores.residual_score),
    scores.she: (feature_scores.fit_she, feature_scores.she_score),
    scores.fdbd: (feature_scores.fit_fdbd, feature_scores.fdbd_score),
    scores.nci: (feature_scores.fit_nci, feature_scores.nci_score),
    scores.react: (activation_shaping.fit_react, activation_shaping.react_score),
    scores.vra: (activation_shaping.fit_vra, activation_shaping.vra_score),
    scores.dice: (activation_shaping.fit_dice, activation_shaping.dice_score),
}


def _program(function, *arguments) -> str:
    return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(*arguments)))


@pytest.mark.parametrize("builder", STATELESS, ids=lambda builder: builder.__name__)
def test_a_stateless_score_is_the_program_of_its_pure_function(builder):
    score = builder()
    assert score.fit is None
    assert score.perturb is None
    ours = _program(lambda logits: score.score(None, {**DATA.test, "logits": logits}, FIT[3]), SCORED[1])
    assert ours == _program(STATELESS[builder], SCORED[1])


@pytest.mark.parametrize("builder", FITTED, ids=lambda builder: builder.__name__)
def test_a_fitted_score_is_the_program_of_its_pure_functions(builder):
    fit, score = FITTED[builder]
    built = builder()
    assert built.perturb is None

    def ours(train, labels, head, test):
        return built.score(built.fit(train, labels, head), test, head)

    def pure(train, labels, head, test):
        state = fit(train["features"], train["logits"], labels, head)
        return score(state, test["features"], test["logits"])

    arguments = DATA.train, DATA.labels, DATA.head, DATA.test
    assert _program(ours, *arguments) == _program(pure, *arguments)


def _energy(h):
    return -lse(h @ W.T + B)


CLIPPED = np.minimum(H, np.percentile(H_TRAIN, 80))
SHAPED = functools.partial(activation_shaping.ash, percentile=60, variant="b")
COMPOSED = {
    "react, max_logit": (scores.react(percentile=80, then="max_logit"), lambda: -(CLIPPED @ W.T + B).max(1)),
    "react, energy": (scores.react(percentile=80), lambda: _energy(CLIPPED)),
    "react, energy at 2": (
        scores.react(percentile=80, then=scores.energy(temperature=2)),
        lambda: -2 * lse((CLIPPED @ W.T + B) / 2),
    ),
    "react, ash, msp": (
        scores.react(percentile=80, then=scores.ash(percentile=60, variant="b", then="maximum_softmax_probability")),
        lambda: -softmax(np.float64(SHAPED(np.float32(CLIPPED))) @ W.T + B).max(1),
    ),
    "ash, grad_norm": (
        scores.ash(percentile=60, variant="b", then="grad_norm"),
        lambda: -np.abs(5 * softmax(SHAPED(np.float32(H)) @ W.T + B) - 1).sum(1) * np.abs(SHAPED(np.float32(H))).sum(1),
    ),
    "scale, max_logit": (
        scores.scale(percentile=50, then="max_logit"),
        lambda: -(activation_shaping.scale(np.float32(H), 50) @ W.T + B).max(1),
    ),
    "vra, max_logit": (
        scores.vra(percentile_low=20, percentile_high=80, then="max_logit"),
        lambda: -(np.clip(H, *np.percentile(H_TRAIN, [20, 80])) @ W.T + B).max(1),
    ),
    "dice at 0, max_logit": (  # all weights but the least one, which contributes the threshold
        scores.dice(percentile=0, then="max_logit"),
        lambda: -(H @ np.where(W * H_TRAIN.mean(0) > (W * H_TRAIN.mean(0)).min(), W, 0).T + B).max(1),
    ),
    "grad_norm": (
        scores.grad_norm(),
        lambda: -np.abs(5 * softmax(F) - 1).sum(1) * np.abs(H).sum(1),
    ),
}  # fmt: skip


@functools.cache
def _composed():
    def run(train, labels, head, test):
        def of(score):
            return score.score(score.fit(train, labels, head) if score.fit else None, test, head)

        return {name: of(score) for name, (score, _) in COMPOSED.items()}

    return jax.jit(run)(DATA.train, DATA.labels, DATA.head, DATA.test)


@pytest.mark.parametrize("name", COMPOSED)
def test_transforms_compose_with_any_score_of_logits(name):
    np.testing.assert_allclose(_composed()[name], COMPOSED[name][1](), rtol=1e-5, atol=1e-5)


def test_a_config_composes_scores_by_name():
    section = dict(
        name="jaxlab.methods.ood_detection.scores:react",
        percentile=80,
        then=dict(name="ash", percentile=60, variant="b", then="maximum_softmax_probability"),
    )
    score = build("data", section)
    run = lambda test: score.score({"high": jnp.float32(1)}, test, DATA.head)  # noqa: E731
    reference = COMPOSED["react, ash, msp"][0]
    expected = lambda test: reference.score({"high": jnp.float32(1)}, test, DATA.head)  # noqa: E731
    assert _program(run, DATA.test) == _program(expected, DATA.test)


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ("max_logits", "then: no logit score 'max_logits'. Did you mean 'max_logit'?"),
        ("mahalanobis", "then: no logit score 'mahalanobis'."),
        (scores.temperature_scaled(), "then: expected a score that is neither fitted"),
        (scores.odin(), "then: expected a score that is neither fitted nor moves"),
        (free_energy.energy, "then: expected a score"),
    ],
)
@pytest.mark.parametrize("builder", [scores.react, scores.vra, scores.ash, scores.scale, scores.dice])
def test_what_follows_a_transform_is_a_score_of_logits(builder, then, message):
    with pytest.raises(UserError, match=message):
        builder(then=then)


@pytest.mark.parametrize(
    ("build_score", "message"),
    [
        (lambda: scores.react(percentile=110), "percentile: expected 0 to 100"),
        (lambda: scores.vra(percentile_low=95), "ascending order"),
        (lambda: scores.energy(temperature=0), "temperature: expected a positive number, got 0"),
        (lambda: scores.odin(temperature=-1), "temperature: expected a positive number, got -1"),
        (lambda: scores.gen(gamma=0), "gamma: expected a positive number, got 0"),
        (lambda: scores.gen(top_m=0), "top_m: expected a positive number, got 0"),
    ],
)
def test_impossible_choices_are_refused_before_anything_is_fitted(build_score, message):
    with pytest.raises(UserError, match=message):
        build_score()


NETWORK = mlp(5, hidden=(16,))
INPUTS = np.random.default_rng(5).normal(size=(7, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(NETWORK.init)(jax.random.key(0), INPUTS)


def _apply(variables, inputs):
    return NETWORK.apply(variables, inputs, train=False)[0]


def test_logits_are_those_of_the_features_and_the_head_of_a_network(variables):
    outputs, head = jax.jit(_apply)(variables, INPUTS), variables["params"]["head"]
    logits = linear(outputs["features"], (head["kernel"], head["bias"]))
    np.testing.assert_allclose(logits, outputs["logits"], rtol=1e-5, atol=1e-6)


def test_odin_scores_what_the_network_says_of_moved_inputs(variables):
    std = (0.5, 1.0, 2.0, 4.0)
    odin = scores.odin(temperature=10, epsilon=0.1, input_std=std)

    @jax.jit
    def both(variables, inputs):
        moved = odin.perturb(functools.partial(_apply, variables), inputs)
        pure = logit_scores.odin_score(lambda v, x: _apply(v, x)["logits"], variables, inputs, 10, 0.1, std)
        return moved, odin.score(None, _apply(variables, moved), DATA.head), pure

    moved, ours, pure = both(variables, INPUTS)
    steps = np.broadcast_to([0.2, 0.1, 0.05, 0.025], (7, 4))
    np.testing.assert_allclose(np.abs(moved - INPUTS), steps, rtol=1e-4)
    np.testing.assert_allclose(ours, pure, rtol=1e-6)


def test_mahalanobis_with_noise_brings_inputs_nearer_to_their_class(variables):
    mahalanobis = scores.mahalanobis(epsilon=0.001)

    @jax.jit
    def both(variables, inputs):
        predict = functools.partial(_apply, variables)
        params = mahalanobis.fit(DATA.train, DATA.labels, DATA.head)
        moved = mahalanobis.perturb(predict, inputs, params)
        return [mahalanobis.score(params, predict(x), DATA.head) for x in (inputs, moved)]

    before, after = both(variables, INPUTS)
    assert np.all(after < before)
