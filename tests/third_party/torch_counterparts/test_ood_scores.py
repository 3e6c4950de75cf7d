"""PyTorch's scores are ours, so that the benchmark compares the same work."""

import functools

import jax
import numpy as np
import pytest

from jaxlab.methods.ood_detection.scores import BUILDERS
from tests.methods.ood_detection.problem import DATA

torch = pytest.importorskip("torch")
from third_party.torch_counterparts import ood_scores  # noqa: E402

NAMES = [name for name, builder in BUILDERS.items() if builder().perturb is None]


@functools.cache
def our_scores() -> dict[str, jax.Array]:
    def program(train, labels, head, test):
        scores = {name: BUILDERS[name]() for name in NAMES}
        return {
            name: score.score(score.fit(train, labels, head) if score.fit else None, test, head)
            for name, score in scores.items()
        }

    return jax.jit(program)(DATA.train, DATA.labels, DATA.head, DATA.test)


def test_there_is_one_for_every_score_that_moves_no_input():
    assert list(ood_scores.SCORES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_counterpart_gives_the_same_scores(name):
    fit, score = ood_scores.SCORES[name]
    train = [torch.from_numpy(DATA.train[key]) for key in ("features", "logits")]
    test = [torch.from_numpy(DATA.test[key]) for key in ("features", "logits")]
    head = tuple(map(torch.from_numpy, DATA.head))
    state = fit(*train, torch.from_numpy(DATA.labels).long(), head) if fit else None
    theirs = score(state, *test).numpy()
    # The authors' L-BFGS stops before the temperature has converged.
    tolerance = 0.2 if name == "temperature_scaled" else 2e-4
    np.testing.assert_allclose(our_scores()[name], theirs, rtol=tolerance, atol=tolerance)
