"""Out-of-distribution scores by the names that a config uses, all under one contract.

The network runs once over each data set, and all scores share its outputs, {"logits": [N, C], "features":
[N, D]}; only a score with a `perturb` needs a pass of its own, over inputs that it has moved. What each
score computes, and whose it is, stands with the pure functions: in `energy.py`, `logit_scores.py`,
`feature_scores.py`, `neighbor_scores.py` and `activation_shaping.py`.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import chex
import jax

from jaxlab.core import Outputs, UserError
from jaxlab.core.errors import nearest
from jaxlab.core.resolve import check_arguments
from jaxlab.methods.ood_detection import activation_shaping, feature_scores, logit_scores, neighbor_scores
from jaxlab.methods.ood_detection import energy as free_energy
from jaxlab.methods.ood_detection.logit_scores import Head

Params = chex.ArrayTree
Predict = Callable[[chex.ArrayTree], Outputs]
InputStd = float | tuple[float, ...]


class Score(NamedTuple):
    """A measure of how far examples are out of distribution, of pure functions that can be compiled.

    Attributes:
      fit: `fit(outputs, labels, head) -> params`, arrays, from what the network says about in-distribution
        data, their labels [N] and its last layer, head = (kernel [D, C], bias [C]). None: nothing is fitted,
        and `params` are None.
      score: `score(params, outputs, head) -> [B]`, **larger for OOD examples**.
      perturb: `perturb(predict, inputs, params=None) -> inputs`, where `predict(inputs) -> outputs` is the
        network in evaluation mode: the inputs whose outputs are to be scored. None: the inputs as they are.
      name: what it is called in tables.
    """

    fit: Callable[[Outputs, jax.Array, Head], Params] | None
    score: Callable[[Params, Outputs, Head], jax.Array]
    perturb: Callable[..., chex.ArrayTree] | None = None
    name: str = ""


class Search(NamedTuple):
    """Scores of one kind, of which the best on validation outliers is to be taken; see `search`."""

    candidates: tuple[Score, ...]
    name: str = ""


def _named(builder: Callable[..., Score]) -> Callable[..., Score]:
    """A builder whose scores go by its name."""

    @functools.wraps(builder)
    def build(*args: Any, **keys: Any) -> Score:
        return builder(*args, **keys)._replace(name=builder.__name__)

    return build


@_named
def maximum_softmax_probability() -> Score:
    """`energy.maximum_softmax_probability`."""
    return _of_logits(free_energy.maximum_softmax_probability)


@_named
def max_logit() -> Score:
    """`energy.max_logit`."""
    return _of_logits(free_energy.max_logit)


@_named
def energy(*, temperature: float = 1.0) -> Score:
    """`energy.energy`."""
    _check_positive(temperature=temperature)
    return _of_logits(functools.partial(free_energy.energy, temperature=temperature))


@_named
def entropy() -> Score:
    """`logit_scores.entropy_score`."""
    return _of_logits(logit_scores.entropy_score)


@_named
def temperature_scaled() -> Score:
    """Maximum softmax probability at the temperature of `logit_scores.fit_temperature`.

    It is meant to be fitted on validation data: on training data the classifier looks too good.
    """
    return _fitted(logit_scores.fit_temperature, logit_scores.temperature_score)


@_named
def uniform_cross_entropy() -> Score:
    """`logit_scores.uniform_xent_score`."""
    return _of_logits(logit_scores.uniform_xent_score)


@_named
def gen(*, gamma: float = 0.1, top_m: int = 100) -> Score:
    """`logit_scores.gen_score`."""
    _check_positive(gamma=gamma, top_m=top_m)
    return _of_logits(functools.partial(logit_scores.gen_score, gamma=gamma, top_m=top_m))


@_named
def odin(*, temperature: float = 1000.0, epsilon: float = 0.0014, input_std: InputStd = 1.0) -> Score:
    """`logit_scores.odin_score`.

    Args:
      temperature: T.
      epsilon: how far the inputs move, in units before normalisation.
      input_std: by which each channel of the inputs was divided.
    """
    _check_positive(temperature=temperature)

    def score(params: Params, outputs: Outputs, head: Head) -> jax.Array:
        return free_energy.maximum_softmax_probability(outputs["logits"], temperature)

    def perturb(predict: Predict, inputs: chex.ArrayTree, params: Params = None) -> chex.ArrayTree:
        return logit_scores.odin_perturb(
            lambda x: predict(x)["logits"],
            inputs,
            temperature=temperature,
            epsilon=epsilon,
            input_std=input_std,
        )

    return Score(None, score, perturb)


@_named
def mahalanobis(*, epsilon: float = 0.0, input_std: InputStd = 1.0) -> Score:
    """`feature_scores.mahalanobis_score`, of inputs that moved towards the nearest class.

    Args:
      epsilon: how far the inputs move, in units before normalisation; 0: they stay.
      input_std: by which each channel of the inputs was divided.
    """

    def perturb(predict: Predict, inputs: chex.ArrayTree, params: Params = None) -> chex.ArrayTree:
        return feature_scores.mahalanobis_perturb(
            params, lambda x: predict(x)["features"], inputs, epsilon, input_std
        )

    score = _fitted(feature_scores.fit_mahalanobis, feature_scores.mahalanobis_score)
    return score._replace(perturb=perturb) if epsilon else score


@_named
def relative_mahalanobis() -> Score:
    """`feature_scores.relative_mahalanobis_score`."""
    return _fitted(feature_scores.fit_relative_mahalanobis, feature_scores.relative_mahalanobis_score)


@_named
def knn(*, k: int = 50, chunk: int = 16_384) -> Score:
    """`neighbor_scores.knn_score`.

    Args:
      k: which neighbour; at most the number of examples it is fitted on.
      chunk: rows of the bank that are compared with at a time.
    """
    fit = functools.partial(neighbor_scores.fit_knn, k=k, chunk=chunk)
    return _fitted(fit, functools.partial(neighbor_scores.knn_score, k=k))


@_named
def vim(*, dim: int | None = None) -> Score:
    """`feature_scores.vim_score`; `dim` of the principal subspace depends on the features' if None."""
    return _fitted(functools.partial(feature_scores.fit_vim, dim=dim), feature_scores.vim_score)


@_named
def residual(*, dim: int | None = None) -> Score:
    """`feature_scores.residual_score`; `dim` as for `vim`."""
    return _fitted(functools.partial(feature_scores.fit_residual, dim=dim), feature_scores.residual_score)


@_named
def react(*, percentile: float = 90.0, then: str | Score = "energy") -> Score:
    """`then` of the logits of features that `activation_shaping.fit_react` clips above.

    The authors take the percentile over validation images; `fit` takes what it is given.
    """
    activation_shaping.check_percentiles(percentile)
    fit = functools.partial(activation_shaping.fit_react, percentile=percentile)
    return _shaped(lambda params, x: activation_shaping.rectify(x, params["high"]), then, fit)


@_named
def ash(
    *, percentile: float = 90.0, variant: Literal["p", "s", "b"] = "s", then: str | Score = "energy"
) -> Score:
    """`then` of the logits of features that `activation_shaping.ash` prunes and sharpens."""
    activation_shaping.check_percentiles(percentile)
    return _shaped(lambda params, x: activation_shaping.ash(x, percentile, variant), then)


@_named
def scale(*, percentile: float = 85.0, then: str | Score = "energy") -> Score:
    """`then` of the logits of features that `activation_shaping.scale` multiplies."""
    activation_shaping.check_percentiles(percentile)
    return _shaped(lambda params, x: activation_shaping.scale(x, percentile), then)


@_named
def dice(*, percentile: float = 90.0, then: str | Score = "energy") -> Score:
    """`then` of the logits of the sparse last layer of `activation_shaping.fit_dice`."""
    activation_shaping.check_percentiles(percentile)
    inner = _logit_score(then)

    def score(params: Params, outputs: Outputs, head: Head) -> jax.Array:
        sparse_head = params["kernel"], params["bias"]
        return inner(outputs["features"], sparse_head)

    return Score(
        _fit_of_outputs(functools.partial(activation_shaping.fit_dice, percentile=percentile)), score
    )


@_named
def grad_norm() -> Score:
    """`feature_scores.grad_norm_score`."""

    def score(params: Params, outputs: Outputs, head: Head) -> jax.Array:
        return feature_scores.grad_norm_score(outputs["features"], outputs["logits"])

    return Score(None, score)


@_named
def kl_matching() -> Score:
    """`logit_scores.kl_matching_score`, which the authors fit on validation data."""
    return _fitted(logit_scores.fit_kl_matching, logit_scores.kl_matching_score)


@_named
def she() -> Score:
    """`feature_scores.she_score`."""
    return _fitted(feature_scores.fit_she, feature_scores.she_score)


@_named
def fdbd() -> Score:
    """`feature_scores.fdbd_score`."""
    return _fitted(feature_scores.fit_fdbd, feature_scores.fdbd_score)


@_named
def nnguide(*, k: int = 100, chunk: int = 16_384) -> Score:
    """`neighbor_scores.nnguide_score`; `k` neighbours are averaged, `chunk` is as for `knn`."""
    fit = functools.partial(neighbor_scores.fit_nnguide, k=k, chunk=chunk)
    return _fitted(fit, functools.partial(neighbor_scores.nnguide_score, k=k))


@_named
def nci(*, alpha: float = 1e-4) -> Score:
    """`feature_scores.nci_score`; `alpha` weighs the norm of the features."""
    return _fitted(feature_scores.fit_nci, functools.partial(feature_scores.nci_score, alpha=alpha))


@_named
def vra(
    *,
    percentile_low: float = 10.0,
    percentile_high: float = 90.0,
    below: Literal["clip", "zero"] = "clip",
    then: str | Score = "energy",
) -> Score:
    """`then` of the logits of features that `activation_shaping.fit_vra` rectifies on both sides.

    Below the lower percentile features are clipped, as in OpenOOD, or 0, as in the paper.
    """
    activation_shaping.check_percentiles(percentile_low, percentile_high)
    fit = functools.partial(
        activation_shaping.fit_vra, percentile_low=percentile_low, percentile_high=percentile_high
    )
    return _shaped(
        lambda params, x: activation_shaping.rectify(x, params["high"], params["low"], below), then, fit
    )


def search(
    *, score: str, grid: Mapping[str, tuple[Any, ...]], fixed: Mapping[str, Any] | None = None
) -> Search:
    """The score among all combinations of a grid that does best on validation outliers.

    Args:
      score: the name of its builder here.
      grid: for each argument of the builder the values to try.
      fixed: its other arguments.

    Raises:
      UserError: no such score, or a value that it does not take.
    """
    if score not in BUILDERS:
        raise UserError(
            f"search: no score '{score}'.{nearest(score, BUILDERS)} Known: {', '.join(BUILDERS)}."
        )
    candidates = []
    for values in itertools.product(*grid.values()):
        keys = {**(fixed or {}), **dict(zip(grid, values))}
        candidates.append(BUILDERS[score](**check_arguments(BUILDERS[score], keys, "search", f"{score}()")))
    if not candidates:
        raise UserError("search: an argument in the grid has no values.")
    return Search(tuple(candidates), score)


# All scores that a name is enough for.
BUILDERS: dict[str, Callable[..., Score]] = {
    builder.__name__: builder
    for builder in (
        maximum_softmax_probability,
        max_logit,
        energy,
        entropy,
        temperature_scaled,
        uniform_cross_entropy,
        gen,
        odin,
        mahalanobis,
        relative_mahalanobis,
        knn,
        vim,
        residual,
        react,
        ash,
        scale,
        dice,
        grad_norm,
        kl_matching,
        she,
        fdbd,
        nnguide,
        nci,
        vra,
    )
}

# Those that a name is enough for as `then`.
_LOGIT_SCORES = (
    "maximum_softmax_probability",
    "max_logit",
    "energy",
    "entropy",
    "uniform_cross_entropy",
    "gen",
    "grad_norm",
)


def _of_logits(function: Callable[[jax.Array], jax.Array]) -> Score:
    return Score(None, lambda params, outputs, head: function(outputs["logits"]))


def _fit_of_outputs(fit: Callable[..., Params]) -> Callable[[Outputs, jax.Array, Head], Params]:
    return lambda outputs, labels, head: fit(outputs["features"], outputs["logits"], labels, head)


def _fitted(fit: Callable[..., Params], score: Callable[..., jax.Array]) -> Score:
    return Score(
        _fit_of_outputs(fit),
        lambda params, outputs, head: score(params, outputs["features"], outputs["logits"]),
    )


def _shaped(
    transform: Callable[[Params, jax.Array], jax.Array],
    then: str | Score,
    fit: Callable[..., Params] | None = None,
) -> Score:
    """The score `then` of features that `transform(params, features)` has changed, and of their logits."""
    inner = _logit_score(then)
    return Score(
        fit and _fit_of_outputs(fit),
        lambda params, outputs, head: inner(transform(params, outputs["features"]), head),
    )


def _logit_score(then: str | Score) -> Callable[[jax.Array, Head], jax.Array]:
    """`then` as a function of features and the head that turns them into logits."""
    if isinstance(then, str):
        if then not in _LOGIT_SCORES:
            known = ", ".join(_LOGIT_SCORES)
            raise UserError(f"then: no logit score '{then}'.{nearest(then, _LOGIT_SCORES)} Known: {known}.")
        then = BUILDERS[then]()
    if not isinstance(then, Score) or then.fit is not None or then.perturb is not None:
        raise UserError("then: expected a score that is neither fitted nor moves its inputs.")

    def score(shaped: jax.Array, head: Head) -> jax.Array:
        return then.score(None, {"features": shaped, "logits": activation_shaping.linear(shaped, head)}, head)

    return score


def _check_positive(**values: Any) -> None:
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{name}: expected a positive number, got {value}.")
