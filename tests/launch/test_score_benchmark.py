"""The times of scores are coherent, and bad input is told in a line."""

import json

import numpy as np
import pytest

from jaxlab.core import UserError
from launch import benchmark, score_benchmark

CONFIG = """
from ml_collections import ConfigDict

def get_config(count="120"):
    noise = dict(name="tests.launch.test_benchmark:noise", count=int(count))
    return ConfigDict(dict(
        method=dict(name="supervised.erm"),
        network=dict(name="mlp", num_classes=10, hidden=[12]),
        optimizer=dict(name="sgd", learning_rate=0.1),
        data=dict(name="streams.resident", dataset=noise),
        devices=dict(seed=1, data=1),
        steps=10, batch_size=8,
        evaluators=dict(
            detection=dict(
                name="ood_detection.detection", dataset=noise, ood=dict(same=noise), train=noise
            ),
        ),
    ))
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "scored_config.py"
    path.write_text(CONFIG)
    return str(path)


def test_every_score_is_timed_in_both_programs(config_file, tmp_path, capsys):
    pytest.importorskip("torch")
    out = tmp_path / "speed.json"
    command = [config_file, "--scores", "--against", "torch", "--rounds", "1", "--out", str(out)]
    assert benchmark.main(command) == 0
    (figures,) = json.loads(out.read_text())["benchmarks"]
    assert figures["forward_seconds"]["median"] > 0
    assert (figures["ours"]["rows"], figures["ours"]["fitted_on"]) == (10_000, 120)
    assert (figures["ours"]["features"], figures["ours"]["classes"]) == (12, 10)
    summed = dict.fromkeys(("ours", "torch"), 0.0)
    for name, of in figures["scores"].items():
        for program in summed:
            seconds = of[program]["score_seconds"]["median"]
            assert seconds > 0
            summed[program] += seconds if name not in score_benchmark.SEARCHING else 0
        ratio = of["torch"]["score_seconds"]["median"] / of["ours"]["score_seconds"]["median"]
        assert of["ratio"]["median"] == pytest.approx(ratio)
    for program, seconds in summed.items():
        np.testing.assert_allclose(figures["all"][program]["score_seconds"]["median"], seconds)
    printed = capsys.readouterr().out
    assert "relative mahalanobis" in printed
    assert "all but knn and nnguide" in printed


def test_a_config_without_scores_is_refused(config_file):
    with pytest.raises(UserError, match=r"--scores takes data from an 'ood_detection\.detection'"):
        benchmark.main([config_file, "--scores", "--config.evaluators={}"])


def test_a_score_that_cannot_be_fitted_is_the_users_error(config_file):
    with pytest.raises(UserError, match="k: expected 1 to 40"):
        benchmark.main([f"{config_file}:40", "--scores", "--rounds", "1"])
