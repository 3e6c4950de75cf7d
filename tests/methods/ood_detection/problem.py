"""A classifier's outputs on random data, and its last layer; in float32 for ours, in float64 for references."""

import functools
from types import SimpleNamespace

import jax
import numpy as np

CLASSES, DIM, TRAIN, TEST = 5, 16, 240, 33


def outputs(features: np.ndarray, head: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    features = features.astype(np.float32)
    return {"features": features, "logits": (features @ head[0] + head[1]).astype(np.float32)}


def _draw() -> SimpleNamespace:
    """Features after a ReLU around a mean for each class; logits that are right more often than not."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(CLASSES, DIM))
    head = (means.T * 0.5).astype(np.float32), rng.normal(size=CLASSES).astype(np.float32)
    labels = rng.integers(0, CLASSES, TRAIN).astype(np.int32)
    train = outputs(np.maximum(means[labels] + rng.normal(size=(TRAIN, DIM)), 0), head)
    test = outputs(np.maximum(rng.normal(size=(TEST, DIM)), 0), head)
    return SimpleNamespace(head=head, labels=labels, train=train, test=test)


DATA = _draw()
FIT = DATA.train["features"], DATA.train["logits"], DATA.labels, DATA.head
SCORED = DATA.test["features"], DATA.test["logits"]
# The same, for references.
H_TRAIN, F_TRAIN = (DATA.train[name].astype(np.float64) for name in ("features", "logits"))
H, F = (DATA.test[name].astype(np.float64) for name in ("features", "logits"))
W, B = DATA.head[0].T.astype(np.float64), DATA.head[1].astype(np.float64)  # [C, D], as PyTorch has it
LABELS = DATA.labels


def softmax(f: np.ndarray) -> np.ndarray:
    e = np.exp(f - f.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def lse(f: np.ndarray) -> np.ndarray:
    return np.log(np.exp(f).sum(-1))


class Cases:
    """Scores to compare with what their authors compute.

    Args:
      cases: name -> (fit, score, reference, tolerance), where `reference()` is for `FIT` and `SCORED`.
    """

    def __init__(self, cases: dict[str, tuple]):
        self.cases = cases
        self.compiled = jax.jit(self._run)  # as one program, which takes less time than one for each
        self._once = functools.cache(lambda: self.compiled(FIT, SCORED))

    def _run(self, fit_arguments: tuple, scored: tuple) -> dict[str, jax.Array]:
        return {name: score(fit(*fit_arguments), *scored) for name, (fit, score, *_) in self.cases.items()}

    def check(self, name: str, *, jit: bool) -> None:
        fit, score, reference, tolerance = self.cases[name]
        scores = self._once()[name] if jit else score(fit(*FIT), *SCORED)
        np.testing.assert_allclose(scores, reference(), rtol=tolerance, atol=tolerance)
