import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from jaxlab.core import UserError
from jaxlab.methods.transfer import linear_probe as lp
from tests.methods.transfer import problem

RNG = np.random.default_rng(0)
CLASSES, SIZE, DIM = 4, 60, 5
LABELS = RNG.integers(0, CLASSES, SIZE)
FEATURES = 3 + 2 * (RNG.normal(size=(SIZE, DIM)) + np.eye(CLASSES, DIM)[LABELS])
CS = np.logspace(-3, 1, 5)


def cross_entropy(W, b, z, y):
    logits = z @ W.T + b
    return np.sum(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y])


def test_one_mean_and_one_deviation_normalise_and_fold_back():
    z, mu, s = lp.normalize_features(FEATURES[:7], FEATURES)
    np.testing.assert_allclose((mu, s), (np.mean(FEATURES), np.std(FEATURES)))
    np.testing.assert_allclose(z, (FEATURES[:7] - mu) / s)
    W, b = RNG.normal(size=(CLASSES, DIM)), RNG.normal(size=CLASSES)
    folded_W, folded_b = lp.fold_normalization(W, b, mu, s)
    np.testing.assert_allclose(FEATURES[:7] @ folded_W.T + folded_b, z @ W.T + b, rtol=1e-12)
    with pytest.raises(UserError, match="all the same"):
        lp.normalize_features(FEATURES, np.ones((3, 3)))


def test_each_probe_is_the_minimum_and_the_smallest_best_C_is_taken():
    z, _, _ = lp.normalize_features(FEATURES, FEATURES)
    W, b, C, table = lp.fit_linear_probe(z, LABELS, CS[::-1], (z[:20], LABELS[:20]))
    assert [row["C"] for row in table] == list(CS)
    best = max(row["accuracy"] for row in table)
    assert next(row["C"] for row in table if row["accuracy"] == best) == C
    assert np.mean((z[:20] @ W.T + b).argmax(1) == LABELS[:20]) == best
    alone = LogisticRegression(C=C, max_iter=2000, tol=1e-8).fit(z, LABELS)

    def objective(W, b):
        return 0.5 * np.sum(W**2) + C * cross_entropy(W, b, z, LABELS)

    np.testing.assert_allclose(objective(W, b), objective(alone.coef_, alone.intercept_), rtol=1e-4)
    # Shifting all intercepts costs nothing: they are free.
    np.testing.assert_allclose(objective(W, b + 3), objective(W, b), rtol=1e-10)


def test_another_solver_is_given_the_solution_before():
    starts = []

    def solver(z, y, C, start):
        starts.append(start)
        return np.full((CLASSES, DIM), C), np.zeros(CLASSES)

    W, _, C, _ = lp.fit_linear_probe(FEATURES, LABELS, CS, (FEATURES, LABELS), solver)
    assert CS[0] == C  # all are as bad
    assert (W == C).all()
    assert starts[0] is None
    assert [start[0][0, 0] for start in starts[1:]] == list(CS[:-1])


def test_classes_that_are_missing_have_logits_of_zero():
    W, b = RNG.normal(size=(2, DIM)), RNG.normal(size=2)
    padded_W, padded_b = lp.pad_head(W, b, [3, 1], 5)
    logits = FEATURES @ padded_W.T + padded_b
    np.testing.assert_array_equal(logits[:, [0, 2, 4]], 0)
    np.testing.assert_allclose(logits[:, [3, 1]], FEATURES @ W.T + b)
    with pytest.raises(UserError, match=r"0\.\.2"):
        lp.pad_head(W, b, [3, 1], 3)
    with pytest.raises(UserError, match="2 rows for 3"):
        lp.pad_head(W, b, [0, 1, 2], 5)


def test_one_row_as_two_has_a_softmax_that_is_the_sigmoid():
    w, b = RNG.normal(size=(1, DIM)), RNG.normal(size=1)
    W2, b2 = lp.binary_to_softmax(w, b)
    logits = FEATURES @ W2.T + b2
    softmax = np.exp(logits[:, 1]) / np.exp(logits).sum(1)
    np.testing.assert_allclose(softmax, 1 / (1 + np.exp(-(FEATURES @ w[0] + b[0]))), rtol=1e-12)
    np.testing.assert_array_equal(W2[0], -W2[1])
    several = RNG.normal(size=(3, DIM)), RNG.normal(size=3)
    for ours, given in zip(lp.binary_to_softmax(*several), several):
        np.testing.assert_array_equal(ours, given)


def test_two_classes_with_gaps_are_probed():
    y = np.where(LABELS < 2, 1, 5)
    W, b, _, table = lp.fit_linear_probe(FEATURES, y, [1.0], (FEATURES, y))
    assert W.shape == (1, DIM)
    padded = lp.pad_head(*lp.binary_to_softmax(W, b), np.unique(y), 6)
    hit = (FEATURES @ padded[0][[1, 5]].T + padded[1][[1, 5]]).argmax(1) == (y == 5)
    assert hit.mean() == table[0]["accuracy"] > 0.6


def test_the_head_takes_the_deviation_it_is_given():
    W, b = RNG.normal(size=(CLASSES, DIM)), RNG.normal(size=CLASSES)
    scaled_W, scaled_b = lp.rescale_head(W, b, 0.1)
    np.testing.assert_allclose(scaled_W.std(), 0.1)
    np.testing.assert_allclose(scaled_b / b, 0.1 / W.std())
    with pytest.raises(UserError, match="same number"):
        lp.rescale_head(np.ones((2, 2)), np.ones(2), 1.0)


def test_the_head_is_set_and_nothing_else():
    W, b = RNG.normal(size=(2, DIM)), RNG.normal(size=2)
    params = {
        "encoder": {"w": np.ones(2)},
        "head": {"kernel": np.zeros((DIM, CLASSES)), "bias": np.zeros(CLASSES)},
    }
    new = lp.set_head(params, W, b)
    np.testing.assert_allclose(new["head"]["kernel"], W.T, rtol=1e-6)
    np.testing.assert_allclose(new["head"]["bias"], b, rtol=1e-6)
    assert new["encoder"] is params["encoder"]
    assert params["head"]["kernel"].shape == (DIM, CLASSES)
    with pytest.raises(UserError, match=r"\[classes, 5\]"):
        lp.set_head(params, W[:, :3], b)
    with pytest.raises(UserError, match="no 'head'"):
        lp.set_head({"encoder": {}}, W, b)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(y=np.zeros(SIZE)), "1 class"),
        (dict(Cs=[]), "positive"),
        (dict(Cs=[0.0, 1.0]), "positive"),
        (dict(z=np.full((SIZE, DIM), np.nan)), "not finite"),
    ],
)
def test_what_cannot_be_probed_is_refused(changed, message):
    arguments = {**dict(z=FEATURES, y=LABELS, Cs=CS, val=(FEATURES, LABELS)), **changed}
    with pytest.raises(UserError, match=message):
        lp.fit_linear_probe(**arguments)


@pytest.mark.slow
def test_the_exact_probe_is_the_functions_above_on_the_networks_features_for_each_seed():
    train, validation = problem.batch(1, 40), problem.batch(2, 20)
    method = lp.exact(problem.NETWORK, dataset=train, validation=validation, num_values=4, batch_size=16)
    keys = jax.random.split(problem.KEY, 2)
    states = jax.jit(jax.vmap(method.init, (0, None)))(keys, problem.batch())
    for i, key in enumerate(keys):
        variables = problem.NETWORK.init(key, train["image"])
        feats, val_feats = (
            np.asarray(problem.NETWORK.apply(variables, d["image"], train=False)[0]["features"])
            for d in (train, validation)
        )
        z, mu, s = lp.normalize_features(feats, feats)
        val = lp.normalize_features(val_feats, feats)[0], validation["label"]
        W, b, _, _ = lp.fit_linear_probe(z, train["label"], np.logspace(-7, 2, 4), val)
        W, b = lp.fold_normalization(W, b, mu, s)
        state = jax.tree.map(lambda x, i=i: x[i], states)
        np.testing.assert_allclose(state.variables["params"]["head"]["kernel"], W.T, rtol=1e-2, atol=1e-3)
        assert problem.changed(variables["params"], state.variables["params"]) == {"head"}
        assert problem.changed(variables["params"], state.initial["params"]) == set()
        after, metrics = jax.jit(method.update)(state, train, problem.KEY)
        jax.tree.map(np.testing.assert_array_equal, after, state)
        assert set(metrics) == {"loss", "accuracy"}
