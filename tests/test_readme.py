"""What the README shows can be run as it stands."""

import re
from pathlib import Path

import pytest

from jaxlab import experiment
from tests.launch import runs

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The README's example of a method, as a module `mine`."""
    (code,) = re.findall(r'```python\n("""Label smoothing.*?)```', README, flags=re.DOTALL)
    assert len(code.splitlines()) <= 40
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)


def test_the_example_of_a_method_trains(mine, tmp_path):
    config = runs.write_config(tmp_path)
    workdir = tmp_path / "run"
    example = ["--config.method.name=mine:label_smoothing", "--config.method.amount=0.2"]
    assert runs.run(config, workdir, *example) == 0
    assert experiment.load(workdir).step == 40


def test_every_command_of_the_readme_exists():
    for command in set(re.findall(r"python -m (launch\.\w+)", README)):
        assert (runs.ROOT / (command.replace(".", "/") + ".py")).is_file(), command


def test_every_config_of_the_table_exists():
    for name in re.findall(r"^\|.*?\| `(\w+/\w+)` \|", README, flags=re.MULTILINE):
        assert (runs.ROOT / "configs" / f"{name}.py").is_file(), name
