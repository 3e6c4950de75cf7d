import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlab.methods.domain_generalization.coral import coral_penalty
from jaxlab.methods.domain_generalization.decaug import DecAugHead, combine_losses, decaug_losses
from jaxlab.methods.domain_generalization.environments import (
    apply_to_environments,
    class_logits,
    environment_risks,
    pairwise_mean,
    penalty_weight,
    predict,
)
from jaxlab.methods.domain_generalization.erm import erm
from jaxlab.methods.domain_generalization.group_dro import group_dro_update, group_risks
from jaxlab.methods.domain_generalization.irm import irm_penalty
from jaxlab.methods.domain_generalization.mmd import mmd_penalty
from jaxlab.methods.domain_generalization.vrex import vrex_penalty
from jaxlab.nn.mlp import mlp
from tests.methods.domain_generalization import problem

RNG = np.random.default_rng(0)
LOGITS, LABELS = RNG.normal(size=(3, 8, 4)).astype(np.float32), RNG.integers(0, 4, (3, 8))
MASK = np.array([[True] * 5 + [False] * 3, [True] * 8, [False] * 8])


def _cross_entropy(logits, labels):
    logits = np.float64(logits)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]


def test_risks_are_means_over_an_environment_and_its_rows_that_are_there():
    @jax.jit
    def compute(logits):
        gradient = jax.grad(lambda f: environment_risks(f, LABELS, MASK).sum())(logits)
        return environment_risks(logits, LABELS), environment_risks(logits, LABELS, MASK), gradient

    risks, masked, gradient = compute(LOGITS)
    losses = _cross_entropy(LOGITS, LABELS)
    np.testing.assert_allclose(risks, losses.mean(1), rtol=1e-5)
    np.testing.assert_allclose(masked, [losses[0, :5].mean(), losses[1].mean(), 0], rtol=1e-5)
    np.testing.assert_array_equal(np.abs(gradient).max(-1) > 0, MASK)


def test_the_sigmoid_loss_is_that_of_two_classes_with_logits_0_and_l():
    logit, y = 5 * LOGITS[..., :1], LABELS % 2

    @jax.jit
    def compute(logit):
        two = class_logits(logit)
        flat = environment_risks(logit[..., 0], y, loss="sigmoid")
        return environment_risks(logit, y, MASK, "sigmoid"), environment_risks(two, y, MASK), flat, two

    sigmoid, softmax, flat, two = compute(logit)
    np.testing.assert_allclose(sigmoid, softmax, rtol=1e-5)
    np.testing.assert_allclose(
        flat, np.logaddexp(0, np.where(y == 1, -1, 1) * logit[..., 0]).mean(1), rtol=1e-5
    )
    np.testing.assert_array_equal(np.argmax(two, -1), logit[..., 0] > 0)


def test_a_network_of_one_logit_predicts_two_classes():
    variables = problem.ONE_LOGIT.init(problem.KEY, problem.BINARY[0]["image"][0])
    image = problem.BINARY[0]["image"][0]
    logit = problem.ONE_LOGIT.apply(variables, image, train=False)[0]["logits"]
    outputs = predict(problem.ONE_LOGIT, variables, {"image": image})
    np.testing.assert_array_equal(outputs["logits"], np.concatenate([0 * logit, logit], 1))
    assert outputs["features"].shape == (problem.SIZE, problem.WIDTH)


def test_the_weight_changes_at_the_step_of_annealing():
    weights = jax.jit(jax.vmap(lambda step: penalty_weight(step, 3, 50.0)))(jnp.arange(5))
    np.testing.assert_array_equal(weights, [1, 1, 1, 50, 50])
    assert penalty_weight(0, 0, 0.0) == 0
    assert penalty_weight(2, 3, 50.0, warm=0.5) == 0.5


def test_the_pairwise_mean_has_every_pair_once():
    features = jnp.array([1.0, 2.0, 4.0, 8.0]).reshape(4, 1, 1)
    mean = jax.jit(lambda f: pairwise_mean(lambda x, y: (10 * x + y).sum(), f))
    np.testing.assert_allclose(mean(features), np.mean([12, 14, 18, 24, 28, 48]), rtol=1e-6)
    assert mean(features[:1]) == 0


def test_environments_that_pass_separately_have_their_own_batch_statistics():
    network = problem.fixed(mlp(3, hidden=(4,), norm="batch_norm"))
    images = problem.BATCHES[0]["image"]
    variables = network.init(problem.KEY, images[0])
    apply = jax.jit(network.apply, static_argnames="train")

    together, after = apply_to_environments(network, variables, images, key=problem.KEY)
    expected, expected_after = apply(variables, images.reshape(-1, 2, 2, 1), train=True, key=problem.KEY)
    problem.assert_close(together["logits"].reshape(-1, 3), expected["logits"])
    jax.tree.map(problem.assert_close, after, expected_after)

    separate, after = apply_to_environments(network, variables, images, key=problem.KEY, separately=True)
    for e, image in enumerate(images):
        expected, variables = apply(variables, image, train=True, key=problem.KEY)
        problem.assert_close(separate["features"][e], expected["features"])
    jax.tree.map(problem.assert_close, after, variables)
    assert np.abs(separate["logits"] - together["logits"]).max() > 0.1


def test_erm_is_torchs_with_decay_in_the_loss():
    torch = pytest.importorskip("torch")

    def loss(step, logits, features, labels, layers):
        value = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels))
        decay = sum((tensor**2).sum() for tensor in jax.tree.leaves(layers))
        return value + 0.02 * decay, {"risk": value, "penalty": torch.zeros(())}

    problem.assert_follows(erm(problem.NETWORK, problem.OPTIMIZER, l2=0.02), loss)


# --- Eight devices, which share the rows [E, n] of a batch ---


def _split(tree):
    """Rows over all devices, so that none has a whole environment."""
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec(None, "data"))
    return jax.device_put(tree, sharding)


def test_penalties_and_their_gradients_on_eight_devices_are_those_on_one():
    rng, shape = np.random.default_rng(1), (2, 16)
    arrays = {
        "logits": rng.normal(size=(*shape, 4)).astype(np.float32),
        "features": (rng.normal(size=(*shape, 5)) * [[[1]], [[2]]]).astype(np.float32),
    }
    integers = {"label": rng.integers(0, 4, shape), "group": rng.integers(0, 3, shape)}

    head = DecAugHead(num_classes=4, num_contexts=3, feature_dim=5)
    params = problem.fixed_variables(jax.eval_shape(head.init, problem.KEY, arrays["features"][0]))["params"]

    @jax.jit
    def compute(arrays, integers):
        def penalties(arrays):
            logits, features = arrays["logits"], arrays["features"]
            risks = environment_risks(logits, integers["label"])
            of_groups = group_risks(features[..., 0].ravel(), integers["group"].ravel(), 4)
            y, context = integers["label"].ravel(), integers["group"].ravel()
            decaug = decaug_losses(head, params, features.reshape(-1, 5), y, context, jnp.float32(0.5))
            weights = group_dro_update(jnp.zeros(4), of_groups, 1.0)[1]
            return {
                "irm split_half": irm_penalty(logits, integers["label"]).sum(),
                "irm square": irm_penalty(logits, integers["label"], "square").sum(),
                "vrex": vrex_penalty(risks),
                "coral": pairwise_mean(coral_penalty, features),
                "mmd": pairwise_mean(functools.partial(mmd_penalty, gammas=(0.1, 1.0)), features),
                "decaug": combine_losses(decaug),  # of a sum over the batch
                "group_dro": jnp.sum(weights * of_groups),
            }

        def trained(arrays):
            values = penalties(arrays)
            return values["irm split_half"] + values["vrex"] + values["coral"]

        return penalties(arrays), jax.grad(trained)(arrays)

    alone = compute(arrays, integers)
    arrays, integers = _split((arrays, integers))
    assert len(arrays["logits"].sharding.device_set) == 8
    shared = compute(arrays, integers)
    jax.tree.map(lambda a, b: problem.assert_close(a, b, 1e-4), shared, alone)
