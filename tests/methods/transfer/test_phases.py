"""Phases: what each trains, from where, and that a run that stopped goes on to the same bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.core import UserError
from jaxlab.methods.transfer import phases
from jaxlab.methods.transfer.fine_tune import fine_tune
from jaxlab.methods.transfer.linear_probe import linear_probe
from jaxlab.methods.transfer.lp_ft import epoch_cosine, lp_ft
from jaxlab.nn.mlp import mlp
from tests.methods.transfer import problem

SGD = optax.sgd(0.1, momentum=0.9)
PRETRAINED = mlp(7, hidden=(6, 5), norm="batch_norm")  # another head


@functools.cache
def two_phases():
    schedule = optax.cosine_decay_schedule(0.2, 3)
    first = optax.adam(schedule)
    return lp_ft(
        problem.NORMALIZED,
        SGD,
        probe_optimizer=first,
        probe_steps=3,
        steps=6,
        pretrained_network=PRETRAINED,
    )


@functools.cache
def undisturbed():
    return problem.run(two_phases(), 6)


def test_the_first_phase_trains_the_head_alone_and_the_second_all_without_touching_statistics():
    states = [problem.run(two_phases(), steps)[0] for steps in (0, 3, 6)]
    start, probed, tuned = (jax.device_get(state.variables) for state in states)
    assert problem.changed(start["params"], probed["params"]) == {"head"}
    assert problem.changed(probed["params"], tuned["params"]) == set(start["params"])
    jax.tree.map(np.testing.assert_array_equal, start["batch_stats"], tuned["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, start, jax.device_get(states[2].initial))
    assert [(int(s.phase), int(s.phase_step)) for s in states] == [(0, 0), (1, 0), (1, 3)]
    assert [m["phase"] for m in undisturbed()[1]] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("stop", [1, 3, 4])  # within a phase, and between two
def test_going_on_from_a_state_ends_with_the_same_bits(stop):
    state, metrics = problem.run(two_phases(), stop)
    state, more = problem.run(
        two_phases(), 6 - stop, jax.tree.map(jnp.array, jax.device_get(state)), first=stop
    )
    jax.tree.map(np.testing.assert_array_equal, state, undisturbed()[0])
    assert metrics + more == undisturbed()[1]


@pytest.mark.slow
def test_two_phases_are_two_runs_one_after_the_other():
    """Each with a fresh optimizer, whose schedule begins with it."""
    lp = linear_probe(
        problem.NORMALIZED, optax.adam(optax.cosine_decay_schedule(0.2, 3)), pretrained_network=PRETRAINED
    )
    probed, _ = problem.run(lp, 3)
    network = problem.NORMALIZED._replace(init=lambda key, inputs: probed.variables)
    tuned, _ = problem.run(fine_tune(network, SGD, batch_norm="eval"), 3, first=3)
    both = undisturbed()[0].variables
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), both, tuned.variables)


@pytest.mark.slow
def test_an_optimizer_that_remembers_parameters_takes_those_at_the_beginning_of_its_phase():
    anchored = optax.GradientTransformation(
        lambda params: params, lambda g, anchor, params: (jax.tree.map(lambda x: -0.1 * x, g), anchor)
    )
    method = phases.in_phases(problem.NETWORK, (phases.Phase(SGD, 2), phases.Phase(anchored)))
    before, _ = problem.run(method, 2)
    state, _ = problem.run(method, 4)
    anchor = state.opt_states[1].inner_states["trained"].inner_state
    jax.tree.map(np.testing.assert_array_equal, anchor, before.variables["params"])


@pytest.mark.slow
def test_full_fine_tuning_is_torchs_sgd_on_the_cross_entropy():
    torch = pytest.importorskip("torch")
    state, metrics = problem.run(fine_tune(problem.NETWORK, SGD), 4)
    start = problem.NETWORK.init(problem.KEY, problem.batch()["image"])["params"]
    layers = jax.tree.map(
        lambda x: torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True), start
    )
    optimizer = torch.optim.SGD(jax.tree.leaves(layers), lr=0.1, momentum=0.9)
    for step in range(4):
        batch = problem.batch(step)
        x = torch.tensor(batch["image"]).double().flatten(1)
        for name in ("dense1", "dense2"):
            x = torch.relu(x @ layers[name]["kernel"] + layers[name]["bias"])
        logits = x @ layers["head"]["kernel"] + layers["head"]["bias"]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(batch["label"]).long())
        np.testing.assert_allclose(metrics[step]["loss"], loss.detach(), rtol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y.detach(), rtol=1e-4, atol=1e-6),
        state.variables["params"],
        layers,
    )


@pytest.mark.slow
def test_modes_of_batch_normalisation_differ_in_the_statistics():
    for mode, moves in (("train", True), ("eval", False)):
        method = fine_tune(problem.NORMALIZED, SGD, batch_norm=mode)
        before, after = (problem.run(method, steps)[0].variables for steps in (0, 1))
        assert bool(problem.changed(before["batch_stats"], after["batch_stats"])) is moves
        assert problem.changed(before["params"], after["params"]) >= {"norm1", "norm2"}


@pytest.mark.slow
def test_chosen_layers_are_tuned_alone():
    before, after = (
        problem.run(fine_tune(problem.NETWORK, SGD, trainable=("dense1",)), steps)[0] for steps in (0, 2)
    )
    assert problem.changed(before.variables["params"], after.variables["params"]) == {"dense1"}


@pytest.mark.slow
def test_seeds_may_be_vmapped():
    method = two_phases()
    states = jax.jit(jax.vmap(method.init, (0, None)))(jnp.stack([problem.KEY] * 2), problem.batch())
    update = jax.jit(jax.vmap(method.update, (0, 0, None)))
    for step in range(6):
        batch = jax.tree.map(lambda x: np.stack([x, x]), problem.batch(step))
        states, _ = update(states, batch, jax.random.fold_in(problem.KEY, step))
    alone = undisturbed()[0].variables
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x[1], y, rtol=1e-4, atol=1e-5), states.variables, alone
    )


def test_the_encoder_is_the_pretrained_one_and_the_head_is_new():
    image = problem.batch()["image"]
    start = phases.start_from(problem.NORMALIZED, PRETRAINED, problem.KEY, image)
    pretrained, fresh = (n.init(problem.KEY, image) for n in (PRETRAINED, problem.NORMALIZED))
    assert (
        problem.changed(start["params"], {**pretrained["params"], "head": fresh["params"]["head"]}) == set()
    )
    with pytest.raises(UserError, match="encoder is not that of"):
        phases.start_from(problem.NORMALIZED, problem.NETWORK, problem.KEY, image)
    with pytest.raises(UserError, match="no layer 'head'"):
        phases.start_from(mlp(None, hidden=(6, 5)), problem.NETWORK, problem.KEY, image)


def test_the_cosine_of_epochs_is_constant_within_one():
    schedule = epoch_cosine(0.3, epoch_steps=4, epochs=5)
    for step in range(20):
        np.testing.assert_allclose(schedule(step), 0.15 * (1 + np.cos(np.pi * (step // 4) / 5)), rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: phases.in_phases(problem.NETWORK, ()), "at least one"),
        (
            lambda: phases.in_phases(problem.NETWORK, (phases.Phase(SGD), phases.Phase(SGD))),
            r"phases\.0\.steps",
        ),
        (
            lambda: lp_ft(problem.NETWORK, SGD, probe_optimizer=SGD, probe_steps=5, steps=5),
            "expected 1 to 4",
        ),
    ],
)
def test_bad_phases_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()
