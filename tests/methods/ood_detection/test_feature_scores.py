import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import sklearn.covariance

from jaxlab.core import UserError
from jaxlab.methods.ood_detection.feature_scores import (
    fdbd_score,
    fit_fdbd,
    fit_mahalanobis,
    fit_nci,
    fit_relative_mahalanobis,
    fit_residual,
    fit_she,
    fit_vim,
    grad_norm_score,
    mahalanobis_perturb,
    mahalanobis_score,
    nci_score,
    relative_mahalanobis_score,
    residual_score,
    she_score,
    vim_score,
)
from tests.methods.ood_detection.problem import (
    CLASSES,
    DIM,
    F_TRAIN,
    FIT,
    H_TRAIN,
    LABELS,
    SCORED,
    B,
    Cases,
    F,
    H,
    W,
    lse,
    softmax,
)


def _precision(centred):
    return sklearn.covariance.EmpiricalCovariance(assume_centered=True).fit(centred).precision_


def _class_means(h_train=H_TRAIN):
    return np.stack([h_train[c == LABELS].mean(0) for c in range(CLASSES)])


def _class_distances(h, h_train=H_TRAIN):
    means = _class_means(h_train)
    precision = _precision(h_train - means[LABELS])
    offsets = h[:, None] - means
    return np.einsum("bci,ij,bcj->bc", offsets, precision, offsets)


def _relative(h):
    offset = h - H_TRAIN.mean(0)
    background = np.einsum("bi,ij,bj->b", offset, _precision(H_TRAIN - H_TRAIN.mean(0)), offset)
    return np.min(_class_distances(h) - background[:, None], axis=1)


def _residual(h, dim=DIM // 2):
    u = -scipy.linalg.pinv(W) @ B
    values, vectors = np.linalg.eigh((H_TRAIN - u).T @ (H_TRAIN - u) / len(H_TRAIN))
    return np.linalg.norm((h - u) @ vectors[:, np.argsort(-values)[dim:]], axis=1)


def _vim(dim=DIM // 2):
    alpha = F_TRAIN.max(1).mean() / _residual(H_TRAIN, dim).mean()
    return alpha * _residual(H, dim) - lse(F)


def _she():
    right = F_TRAIN.argmax(1) == LABELS
    patterns = np.stack([H_TRAIN[right & (c == LABELS)].mean(0) for c in range(CLASSES)])
    return -np.sum(H * patterns[F.argmax(1)], axis=1)


def _fdbd():
    total = np.zeros(len(F))
    for i, predicted in enumerate(F.argmax(1)):
        for c in set(range(CLASSES)) - {predicted}:
            total[i] += abs(F[i, c] - F[i, predicted]) / np.linalg.norm(W[predicted] - W[c])
    return -total / np.linalg.norm(H - H_TRAIN.mean(0), axis=1)


def _nci(alpha):
    z = H - H_TRAIN.mean(0)
    along = np.array([W[c] @ row for c, row in zip(F.argmax(1), z)]) / np.linalg.norm(z, axis=1)
    return -(along + alpha * np.abs(H).sum(1))


def _grad_norm():
    """The gradient itself: d/dW of -Σ_c log p_c is the outer product of C p - 1 and h."""
    gradients = (CLASSES * softmax(F) - 1)[:, :, None] * H[:, None, :]
    return -np.abs(gradients).sum((1, 2))


CASES = {
    "mahalanobis": (fit_mahalanobis, mahalanobis_score, lambda: _class_distances(H).min(1) / 2, 1e-5),
    "relative_mahalanobis": (fit_relative_mahalanobis, relative_mahalanobis_score, lambda: _relative(H), 1e-4),
    "vim": (fit_vim, vim_score, _vim, 1e-4),
    "vim_3": (functools.partial(fit_vim, dim=3), vim_score, lambda: _vim(3), 1e-4),
    "residual": (fit_residual, residual_score, lambda: _residual(H), 1e-5),
    "she": (fit_she, she_score, _she, 1e-5),
    "fdbd": (fit_fdbd, fdbd_score, _fdbd, 1e-5),
    "nci": (fit_nci, nci_score, lambda: _nci(1e-4), 1e-5),
    "nci_norm": (fit_nci, functools.partial(nci_score, alpha=0.1), lambda: _nci(0.1), 1e-5),
    "grad_norm": (lambda *_: None, lambda _, *scored: grad_norm_score(*scored), _grad_norm, 1e-5),
}  # fmt: skip
COMPARED = Cases(CASES)


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_the_authors_formula(name):
    COMPARED.check(name, jit=True)


SLOW = "relative_mahalanobis", "vim", "vim_3", "residual"  # many programs of one operation each to compile


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES]
)
def test_scores_equal_the_authors_formula_without_jit(name):
    COMPARED.check(name, jit=False)


def test_grad_norm_is_the_norm_of_the_gradient_that_autograd_finds():
    def loss(weights, h):
        return -jnp.sum(jax.nn.log_softmax(weights @ h + B))

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(W, H)
    np.testing.assert_allclose(_grad_norm(), -np.abs(gradients).sum((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("epsilon", [0.002, 0.3])
def test_mahalanobis_noise_moves_inputs_towards_the_nearest_class(epsilon):
    rng = np.random.default_rng(3)
    weights, inputs, std = rng.normal(size=(6, DIM)), rng.normal(size=(9, 2, 3)), np.array([0.5, 1.0, 2.0])

    h = np.maximum(inputs.reshape(9, 6) @ weights, 0)
    means = _class_means()
    offsets = h - means[_class_distances(h).argmin(1)]
    gradient = ((offsets @ _precision(H_TRAIN - means[LABELS])) * (h > 0)) @ weights.T  # of half the distance
    expected = inputs - epsilon * np.where(gradient.reshape(inputs.shape) >= 0, 1, -1) / std

    @jax.jit
    def moved(state, x, epsilon):
        features = lambda x: jax.nn.relu(x.reshape(9, 6) @ jnp.float32(weights))  # noqa: E731
        return mahalanobis_perturb(state, features, x, epsilon, tuple(std))

    state = fit_mahalanobis(*FIT)
    np.testing.assert_allclose(moved(state, np.float32(inputs), epsilon), expected, atol=1e-6)


def test_an_empty_class_takes_no_part():
    features, logits, labels, head = FIT
    wider = np.pad(head[0], ((0, 0), (0, 2))), np.pad(head[1], (0, 2))

    @jax.jit
    def scores_and_gradient(h):
        with_empty = fit_mahalanobis(features, logits, labels, wider)
        return jax.vmap(jax.value_and_grad(lambda h: mahalanobis_score(with_empty, h, None)))(h)

    scores, gradient = scores_and_gradient(SCORED[0])
    np.testing.assert_allclose(scores, _class_distances(H).min(1) / 2, rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_a_class_without_a_right_answer_has_no_pattern():
    features, _, labels, head = FIT
    never_the_third = np.float32(np.eye(CLASSES))[(labels + (labels == 2)) % CLASSES]
    patterns = np.asarray(fit_she(features, never_the_third, labels, head)["patterns"])
    np.testing.assert_array_equal(patterns.any(axis=1), [True, True, False, True, True])


def _with_features(features):
    logits = np.float32(features @ W.T + B)
    scored = np.float32(features[: len(H)]), logits[: len(H)]
    return COMPARED.compiled((np.float32(features), logits, *FIT[2:]), scored)


ALIVE = np.arange(DIM) % 3 > 0


@pytest.mark.parametrize(
    "features",
    [np.zeros_like(H_TRAIN), np.ones_like(H_TRAIN), np.where(ALIVE, H_TRAIN, 0)],
    ids=["all zero", "constant", "some always zero"],
)
def test_degenerate_features_score_without_nan(features):
    for name, scores in _with_features(features).items():
        assert np.isfinite(scores).all(), name


def test_mahalanobis_with_units_that_never_fire_is_that_of_the_others():
    scores = _with_features(np.where(ALIVE, H_TRAIN, 0))["mahalanobis"]
    expected = _class_distances(H_TRAIN[: len(H), ALIVE], H_TRAIN[:, ALIVE]).min(1) / 2
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


@pytest.mark.parametrize("dim", [-1, DIM])
def test_a_principal_subspace_leaves_a_residual(dim):
    with pytest.raises(UserError, match=f"dim: expected 0 to {DIM - 1}, .* got {dim}"):
        fit_vim(*FIT, dim=dim)


@pytest.mark.parametrize(("size", "left"), [(8, 4), (512, 256), (768, 256), (2048, 1048)])
def test_the_principal_subspace_is_as_large_as_the_authors_say(size, left):
    arguments = np.zeros((3, size)), np.zeros((3, 2)), np.zeros(3, int), (np.zeros((size, 2)), np.zeros(2))
    state = jax.eval_shape(fit_vim, *arguments)
    assert state["null_space"].shape == (size, left)
