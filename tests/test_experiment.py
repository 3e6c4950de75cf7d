"""A config becomes a run, and a run's folder becomes its parts again."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import config as configs
from jaxlab import experiment
from jaxlab.core import UserError
from tests.launch import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    runs.write_config(folder)
    assert runs.run(folder / "config.py", folder / "run") == 0
    return folder


def config_of(tmp_path, text=runs.CONFIG, **overrides):
    return experiment.load_config(str(runs.write_config(tmp_path, text)), overrides)


def train_steps(config, steps):
    """The parameters after each of some steps, on one device, first seed."""
    parts = experiment.build_parts(config)
    program = experiment.build_program(parts, experiment.build_mesh(parts.settings))
    replicas = program.init()
    history = [jax.tree.map(lambda x: np.asarray(x[0]), replicas.state.variables["params"])]
    for step in range(steps):
        replicas, _ = program.call(replicas, step, 1, None)
        history.append(jax.tree.map(lambda x: np.asarray(x[0]), replicas.state.variables["params"]))
    return history


def norm_of_difference(a, b):
    return np.sqrt(sum(np.sum((x - y) ** 2) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))))


def test_a_loaded_run_predicts_for_every_seed(folder):
    run = experiment.load(folder / "run")
    batch = run.streams["train"].batch(0, jax.random.key(0))
    logits = run.predict(run.state, batch)["logits"]
    assert (run.step, logits.shape) == (40, (2, 16, 2))
    first = jax.tree.map(lambda x: x[0], run.state)
    np.testing.assert_allclose(run.method.predict(first, batch)["logits"], logits[0], rtol=1e-5)


def test_an_earlier_checkpoint_can_be_loaded_and_a_missing_one_is_named(folder):
    assert experiment.load(folder / "run", 30).step == 30
    with pytest.raises(UserError, match="no checkpoint of step 7; there are: 30, 40"):
        experiment.load(folder / "run", 7)
    with pytest.raises(UserError, match="no run here"):
        experiment.load(folder)


def test_overrides_are_read_as_values(tmp_path):
    config = config_of(
        tmp_path,
        **{"network.hidden": "[4,4]", "network.norm": "none", "optimizer.nesterov": "true", "seeds": "3"},
    )
    assert config["network"] == {"hidden": [4, 4], "name": "mlp", "norm": None, "num_classes": 2}
    assert config["optimizer"]["nesterov"] is True
    assert config["seeds"] == 3


def test_stages_run_behind_what_they_start_from_and_inherit_the_rest(tmp_path):
    config = config_of(tmp_path, runs.STAGED, **{"seeds": "1", "stages.base.batch_size": "32"})
    stages = configs.stage_configs(config)
    assert list(stages) == ["base", "tuned"]
    assert [s["batch_size"] for s in stages.values()] == [32, 16]
    assert [s["seeds"] for s in stages.values()] == [1, 1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"stages.tuned.init_from": "bse"},
            "config.stages.tuned.init_from: no stage 'bse'. Did you mean 'base'",
        ),
        ({"stages.base.init_from": "tuned"}, "in a circle"),
        ({"stages.base.stepz": "3"}, "config.stages.base.stepz: no such key. Did you mean 'steps'"),
        ({"stages.base.network.hiden": "[3]"}, "config.stages.base.network: no such section"),
        ({"steps": "3"}, "config.steps: every stage sets its own; set config.stages.tuned.steps"),
    ],
)
def test_a_mistake_in_a_stage_is_named(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        config_of(tmp_path, runs.STAGED, **overrides)


def test_a_config_may_be_plain_dicts(tmp_path):
    text = runs.CONFIG.replace("    return c", "    return c.to_dict()")
    assert config_of(tmp_path, text) == config_of(tmp_path)


def test_gradients_are_clipped_to_the_norm(tmp_path):
    config = config_of(tmp_path, clip_norm="0.001", **{"optimizer.momentum": "0.0"})
    before, after = train_steps(config, 1)
    assert norm_of_difference(before, after) == pytest.approx(0.1 * 0.001, rel=1e-3)


def test_gradients_are_accumulated_over_steps(tmp_path):
    history = train_steps(config_of(tmp_path, accumulate_steps="3"), 6)
    moved = [norm_of_difference(a, b) > 0 for a, b in itertools.pairwise(history)]
    assert moved == [False, False, True, False, False, True]


def test_mixed_precision_keeps_parameters_in_float32_and_learns(tmp_path):
    config = config_of(tmp_path, **{"network.dtype": "bfloat16"})
    history = train_steps(config, 20)
    assert {x.dtype for x in jax.tree.leaves(history)} == {np.dtype("float32")}
    parts = experiment.build_parts(config)
    batch = parts.stream.batch(100, jax.random.key(5))
    program = experiment.build_program(parts, experiment.build_mesh(parts.settings))
    replicas, _ = program.call(program.init(), 0, 20, None)
    state = jax.tree.map(lambda x: x[0], replicas.state)
    logits = parts.make_method(None).predict(state, batch)["logits"]
    assert np.mean(np.asarray(jnp.argmax(logits, -1)) == batch["label"]) > 0.9


def test_a_data_set_where_a_stream_is_needed_is_refused(tmp_path):
    text = runs.CONFIG.replace(
        'dict(name="tests.toy:blobs")', 'dict(name="store.arrays", dataset="digits", split="test")'
    )
    with pytest.raises(UserError, match="config.data: 'store.arrays' builds no Stream"):
        experiment.build_parts(config_of(tmp_path, text))
