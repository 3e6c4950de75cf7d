import jax
import numpy as np

from jaxlab.methods.ood_detection.margins import margins

SHARP = {"image": np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32) + np.float32([9, 0, 0, 0])}
FLAT = {"image": np.random.default_rng(1).normal(size=(20, 4)).astype(np.float32)}


@jax.jit
def predict(state, batch):
    return {"logits": state * batch["image"]}


def mean_energy(columns):
    return -np.log(np.exp(columns["image"]).sum(1)).mean()


def test_margins_lie_outside_the_mean_energies():
    measured = margins(SHARP, FLAT, slack=1.5, batch_size=16).evaluate(predict, 1.0)
    expected = mean_energy(SHARP), mean_energy(FLAT)
    np.testing.assert_allclose([measured["energy_in"], measured["energy_out"]], expected, rtol=1e-5)
    proposed = measured["margin_in"], measured["margin_out"]
    np.testing.assert_allclose(proposed, [expected[0] - 1.5, expected[1] + 1.5], rtol=1e-5)


def test_margins_that_would_invert_have_no_value():
    measured = margins(FLAT, SHARP, slack=1.5).evaluate(predict, 1.0)
    assert measured["energy_in"] > measured["energy_out"]
    assert np.isnan([measured["margin_in"], measured["margin_out"]]).all()
