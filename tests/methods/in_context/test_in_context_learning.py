"""Training on prompts: its loss and metrics, one compilation for a whole curriculum, the same bits after a kill."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import experiment
from jaxlab.core import Method
from jaxlab.methods.in_context.backbones import gpt
from jaxlab.methods.in_context.functions import linear, linear_classification
from jaxlab.methods.in_context.in_context_learning import in_context_learning
from jaxlab.methods.in_context.model import in_context_model
from jaxlab.methods.in_context.prompts import in_context_prompts
from tests.launch import runs

CONFIG = """
def get_config():
    function, curriculum = dict(name="linear"), dict(start=1, inc=1, interval=2)
    backbone = dict(name="gpt", n_embd=8, n_layer=1, n_head=2, n_positions=4)
    errors = dict(name="in_context.evaluation.prompt_kind", function=function, dimension=3, num_points=4)
    return dict(
        steps=40, batch_size=8, seeds=2, log_every=2, checkpoint_every=4, steps_per_call=2,
        devices=dict(seed=1, data=1),
        method=dict(name="in_context.in_context_learning"),
        network=dict(name="in_context.model.in_context_model", backbone=backbone),
        optimizer=dict(name="adam", learning_rate=1e-2),
        data=dict(
            name="in_context.prompts.in_context_prompts", function=function, dimension=3, num_points=4,
            dims_curriculum=dict(end=3, **curriculum), points_curriculum=dict(end=4, **curriculum),
        ),
        evaluators=dict(
            errors=dict(name="in_context.evaluation.paired_errors", prompts=dict(only=errors), num_prompts=16)
        ),
    )
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "prompts_config.py"
    path.write_text(CONFIG)
    return path


def method_and_batch(function=None, **keys):
    network = in_context_model(gpt(n_embd=8, n_layer=1, n_head=2))
    curriculum = dict(start=2, inc=1, interval=1)
    stream = in_context_prompts(
        function or linear(),
        batch_size=6,
        num_points=5,
        dimension=3,
        dims_curriculum=dict(end=3, **curriculum),
        points_curriculum=dict(end=5, **curriculum),
    )
    method = in_context_learning(network, optax.sgd(0.1), **keys)
    return Method(*map(jax.jit, method)), jax.jit(stream.batch)(1, jax.random.key(0))


def test_the_loss_is_the_mean_over_the_first_points_and_the_excess_that_over_least_squares():
    method, batch = method_and_batch()
    state = method.init(jax.random.key(1), batch)
    preds = np.float64(method.predict(state, batch)["predictions"])
    _, metrics = method.update(state, batch, jax.random.key(2))
    loss = np.mean((preds - np.float64(batch["ys"]))[:, :3] ** 2)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["excess_loss"], loss / np.mean([3, 2, 1]), rtol=1e-5)
    assert (metrics["n_dims"], metrics["n_points"]) == (3, 3)


def test_labels_of_two_signs_are_learnt_by_the_logistic_loss():
    method, batch = method_and_batch(linear_classification(), loss="logistic_loss")
    state = method.init(jax.random.key(1), batch)
    preds = np.float64(method.predict(state, batch)["predictions"])
    _, metrics = method.update(state, batch, jax.random.key(2))
    loss = np.mean(np.log1p(np.exp(-np.float64(batch["ys"]) * preds))[:, :3])
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


def test_what_comes_after_the_curriculum_changes_neither_loss_nor_update():
    method, batch = method_and_batch()
    state = method.init(jax.random.key(1), batch)
    other = {
        **batch,
        "xs": batch["xs"].at[:, 3:].set(7.0),
        "ys": batch["ys"].at[:, 3:].set(-5.0),
    }
    short = {**batch, "xs": batch["xs"][:, :3], "ys": batch["ys"][:, :3]}
    updated = [method.update(state, b, jax.random.key(2))[0].variables for b in (batch, other, short)]
    for tree in updated[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updated[0], tree)


def test_a_whole_curriculum_is_one_compilation(config_file):
    parts = experiment.build_parts(experiment.load_config(str(config_file)))
    program = experiment.build_program(parts, experiment.build_mesh(parts.settings))
    replicas, seen = program.init(), []
    for step in range(0, 12, 2):
        replicas, _ = program.call(replicas, step, 2, None)
        n_points = parts.stream.batch(step, jax.random.key(0))["n_points"][0]
        seen.append(int(n_points))
    assert seen == [1, 2, 3, 4, 4, 4]
    assert program.num_compiled() == 1
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(replicas.state.variables))


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(config_file, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert runs.run(config_file, whole) == 0
    with monkeypatch.context() as patch:
        runs.stop_at(patch, 6)
        assert runs.run(config_file, parts) == 128 + signal.SIGTERM
    assert 0 < json.loads(runs.result(parts))["step"] < 40
    assert runs.run(config_file, parts) == 0
    for file in ("metrics.jsonl", "result.json"):
        assert (whole / file).read_text() == (parts / file).read_text()
    jax.tree.map(np.testing.assert_array_equal, runs.final_state(whole), runs.final_state(parts))
