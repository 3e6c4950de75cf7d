"""Every config, at every size, builds: names resolve and all shapes fit. Nothing is trained."""

from pathlib import Path

import pytest

from jaxlab import config as configs
from jaxlab import experiment

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/*/*.py"))


@pytest.mark.parametrize("size", ["cpu", "paper"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_config_builds(path, size, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    config = experiment.load_config(f"{path}:{size}", {"seeds": "1", "devices.data": "1"})
    for stage, stage_config in (configs.stage_configs(config) or {"": config}).items():
        parts = experiment.build_parts(stage_config, stage)
        shapes = experiment.build_program(parts, experiment.build_mesh(parts.settings)).abstract()
        assert shapes.state.variables["params"]
        assert set(shapes.metric_sums) >= {"loss"}
