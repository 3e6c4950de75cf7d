"""Transfer through the command line: stages that hand over, and runs killed in and between phases."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest

from jaxlab import config as configs
from jaxlab import experiment
from jaxlab.core import UserError
from jaxlab.data import store
from launch import select_stages
from tests.launch import runs

STAGES = """    c.network = dict(name="mlp", num_classes=2, hidden=[8, 8], norm="batch_norm")
    sgd = dict(name="sgd", learning_rate=0.05, momentum=0.9)
    new_head = dict(
        pretrained_network=dict(name="mlp", num_classes=2, hidden=[8, 8], norm="batch_norm"),
        probe_optimizer=dict(name="adam", learning_rate=0.02),
        probe_steps=20,
    )
    c.stages = ConfigDict(sort_keys=False)
    c.stages.base = dict(steps=20)
    c.stages.tuned = dict(
        init_from=dict(pretrained_network="base"), method=dict(name="transfer.lp_ft", **new_head)
    )
    return c"""
CONFIG = runs.CONFIG.replace("    return c", STAGES)


@pytest.mark.slow
def test_a_run_killed_within_and_between_phases_ends_with_the_same_bits(tmp_path, monkeypatch):
    config = runs.write_config(tmp_path, CONFIG)
    whole = tmp_path / "whole"
    assert runs.run(config, whole) == 0
    records = [json.loads(line) for line in runs.lines(whole / "tuned").splitlines()]
    assert [r["phase"] for r in records if r["split"] == "train"] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    start, end = (runs.final_state(whole / stage).variables["params"] for stage in ("base", "tuned"))
    assert not np.array_equal(start["dense1"]["kernel"], end["dense1"]["kernel"])
    for step, calls in ((10, 3), (20, 100), (30, 7)):
        workdir = tmp_path / f"stopped_{step}"
        shutil.copytree(whole / "base", workdir / "base")
        with monkeypatch.context() as patch:
            runs.stop_at(patch, step)
            assert runs.run(config, workdir, f"--config.steps_per_call={calls}") == 128 + signal.SIGTERM
        assert runs.run(config, workdir) == 0
        assert runs.lines(workdir / "tuned") == runs.lines(whole / "tuned")
        jax.tree.map(
            np.testing.assert_array_equal,
            runs.final_state(workdir / "tuned"),
            runs.final_state(whole / "tuned"),
        )


@pytest.fixture
def few_images(monkeypatch):
    def arrays(dataset, split, data_dir=None):
        rows = np.arange(40, dtype=np.int32)
        image = np.random.default_rng(0).integers(0, 256, (40, 28, 28, 1)).astype(np.uint8)
        return {"image": image, "label": rows % 10}

    monkeypatch.setattr(store, "arrays", arrays)


@pytest.mark.slow
def test_every_method_of_the_comparison_fits_what_it_is_handed(few_images):
    """One rate of each; shapes only."""
    config = experiment.load_config(f"{runs.ROOT}/configs/transfer/fashion_mnist.py")
    kept = {
        name: stage for name, stage in config["stages"].items() if "_lr_" not in name or name.endswith("1e-2")
    }
    assert len(kept) == 15
    experiment.check_stages({**config, "stages": kept})
    assert list(configs.stage_configs(config))[:2] == ["pretrain", "lp"]


def test_rates_are_chosen_on_the_metric_by_the_mean_over_seeds():
    metric = "shift/validation_accuracy"
    values = {"lp": [0.5], "ft_lr_1e-4": [0.1, 0.8], "ft_lr_1e-3": [0.5, 0.6], "ft_lr_1e-2": [0.6, 0.5]}
    evals = {f"{stage}/{metric}": {"values": v} for stage, v in values.items()}
    result = {"config": {"stages": dict.fromkeys(values)}, "evals": evals}
    assert select_stages.select(result, metric) == {"lp": "lp", "ft at 1e-3": "ft_lr_1e-3"}
    with pytest.raises(UserError, match="Did you mean 'shift/validation_accuracy'"):
        select_stages.select(result, "shift/validation_acc")
    with pytest.raises(UserError, match="METHOD_lr_RATE"):
        select_stages.select({"config": {"stages": {"lp": {}}}, "evals": evals}, metric)
