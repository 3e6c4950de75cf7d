"""A config file, read and completed: plain dicts in the order written, defaults filled in.

What its sections name is checked in `jaxlab.experiment`.
"""

import ast
import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import re
import traceback
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_collections
import numpy as np

from jaxlab.core import UserError
from jaxlab.core.errors import nearest
from jaxlab.core.resolve import check_arguments, describe

logger = logging.getLogger(__name__)

# Beside the folders of stages, a run's folder has these.
_FOLDERS = ("checkpoints", "plots", "report")
_INT32_MAX = 2**31 - 1
_LEAST = dict.fromkeys(
    ("steps", "batch_size", "seeds", "log_every", "max_to_keep", "accumulate_steps", "steps_per_call"), 1
) | dict.fromkeys(("seed", "eval_every", "checkpoint_every", "clip_norm"), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of a config, with their defaults. Sections are resolved by `name` (see `jaxlab.core`).

    Attributes:
      method: section: the learning algorithm.
      data: section: the training stream.
      network: section, for methods that take a network.
      optimizer: section, for methods that take an optimizer.
      evaluators: name → section.
      steps: training steps.
      batch_size: examples a step, over all devices.
      seed: the first replica's seed; replica i has seed + i.
      seeds: independent replicas trained as one program.
      log_every: steps between two lines of training metrics, each a mean over that many steps.
      eval_every: steps between two evaluations; 0: one at the end.
      checkpoint_every: steps between two checkpoints; 0: one at the end.
      max_to_keep: how many of the newest checkpoints to keep.
      best_metric: also keep the checkpoint with the best mean of this metric, "<evaluator>/<metric>".
      best_mode: whether best is "max" or "min".
      clip_norm: clip gradients to this global norm; 0: do not.
      accumulate_steps: average gradients over this many steps before the optimizer moves.
      devices: sizes of the mesh axes `seed` and `data`; -1: all devices that are left.
      backend: "mesh" or "pmap".
      steps_per_call: the most steps to run in one compiled call.
      data_dir: where prepared data sets are; "": TFDS's own default.
      init_from: the stage, or the folder of a finished run beside this one, whose variables training
        starts from; "": fresh ones. Where a method takes several networks: parameter of the method → stage.
      stages: ordered name → keys that differ from the rest of the config; makes a run of several stages.
    """

    method: Mapping
    data: Mapping
    steps: int
    batch_size: int
    network: Mapping | None = None
    optimizer: Mapping | None = None
    evaluators: Mapping = dataclasses.field(default_factory=dict)
    seed: int = 0
    seeds: int = 1
    log_every: int = 100
    eval_every: int = 0
    checkpoint_every: int = 0
    max_to_keep: int = 2
    best_metric: str = ""
    best_mode: Literal["max", "min"] = "max"
    clip_norm: float = 0.0
    accumulate_steps: int = 1
    devices: Mapping = dataclasses.field(default_factory=lambda: {"seed": 1, "data": -1})
    backend: Literal["mesh", "pmap"] = "mesh"
    steps_per_call: int = 100
    data_dir: str = ""
    init_from: str | Mapping = ""

    @property
    def sources(self) -> dict[str, str]:
        """The networks that the method is handed over: parameter of the method → stage."""
        return sources_of(self.init_from, "config.init_from")


def read_file(path_and_size: str, overrides: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Reads a config file.

    Args:
      path_and_size: "configs/debiasing/colored_mnist.py", or with arguments for its `get_config` behind a
        colon: "...py:paper" or "...py:paper,lff".
      overrides: dotted key → value as written on a command line.

    Returns:
      The whole config as plain dicts, defaults filled in.

    Raises:
      UserError: no such file, no such size, or anything wrong in the config.
    """
    path, _, arguments = path_and_size.partition(":")
    get_config = getattr(_import_file(path), "get_config", None)
    if not callable(get_config):
        raise UserError(f"{path}: a config file defines get_config(size='cpu'); this one does not.")
    with _naming_line(path):
        config = get_config(*arguments.split(",")) if arguments else get_config()
    if not isinstance(config, (Mapping, ml_collections.ConfigDict)):
        raise UserError(f"{path}: get_config() returned {config!r}; it returns a ConfigDict.")
    return complete(config, overrides)


def complete(config: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A config as plain dicts, with overrides applied, defaults filled in and stages in running order.

    Raises:
      UserError: unknown, missing or misspelt keys, or values of the wrong type.
    """
    config = _with_defaults(to_plain(config))
    for key, value in (overrides or {}).items():
        _override(config, key, value)
    stages = _stages(config)
    config.pop("stages", None)
    if not stages:
        settings_of(config)
        return config
    config["stages"] = {name: stages[name] for name in _stage_order(stages)}
    for name, stage in stage_configs(config).items():
        settings_of(stage, name)
    return config


def stage_configs(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages of a config in the order they run, each a config of its own; {} where there are none."""
    shared = {key: value for key, value in config.items() if key != "stages"}
    return {name: {**shared, **stage} for name, stage in config.get("stages", {}).items()}


def read_config(workdir: str | Path) -> dict[str, Any]:
    """The config of a run's folder.

    Raises:
      UserError: the folder is no run, or its config.json cannot be read.
    """
    path = Path(workdir) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{workdir}: no run here (no config.json); give the --workdir of a run.") from error
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}).") from error


def sources_of(init_from: str | Mapping[str, str], path: str) -> dict[str, str]:
    """What stands in a config as `init_from`, as parameter of the method → stage; `path` is for messages."""
    sources = init_from if isinstance(init_from, Mapping) else {"network": init_from} if init_from else {}
    for source in sources.values():
        if not isinstance(source, str) or not source:
            raise UserError(f"{path}: expected the name of a stage, got {source!r}.")
    return dict(sources)


def place(stage: str = "") -> str:
    """Where a stage's keys stand in a config, for messages."""
    return f"config.stages.{stage}" if stage else "config"


def settings_of(config: Mapping[str, Any], stage: str = "") -> Settings:
    """The flat keys of a config without stages, or of one stage.

    Raises:
      UserError: unknown or missing keys, values of the wrong type or out of range.
    """
    path = place(stage)
    check_arguments(Settings, config, path, "a config")
    settings = Settings(**config)
    for key, least in _LEAST.items():
        value, most = getattr(settings, key), _INT32_MAX - (settings.seeds if key == "seed" else 0)
        if value < least:
            raise UserError(f"{path}.{key}: expected {least} or more, got {value}.")
        if value > most:
            raise UserError(f"{path}.{key}: expected {most} or less, got {value}.")
    check_arguments(_mesh, settings.devices, f"{path}.devices", "the mesh")
    return settings


def _mesh(*, seed: int, data: int) -> None:
    """What `config.devices` is checked against."""


def to_plain(value: Any, path: str = "config") -> Any:
    """A ConfigDict as plain dicts and lists, as it is written to JSON; the order of keys is kept.

    Raises:
      UserError: JSON cannot hold it; the message has the key below `path`.
    """
    if isinstance(value, (Mapping, ml_collections.ConfigDict)):
        for key in value:
            if not isinstance(key, str):
                raise UserError(f"{path}: {key!r} cannot be a key; keys are text.")
        return {key: to_plain(v, f"{path}.{key}") for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v, f"{path}.{i}") for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path}: {value} cannot be written to config.json; give a finite number.")
    if not isinstance(value, (bool, int, float, str, types.NoneType)):
        raise UserError(
            f"{path}: a value of type {type(value).__name__} cannot be written to config.json; a config holds"
            " numbers, text, None, lists and mappings (a function by its name)."
        )
    return value


def _import_file(path: str) -> types.ModuleType:
    if not Path(path).is_file():
        known = [str(p) for p in Path("configs").rglob("*.py") if p.name != "__init__.py"]
        raise UserError(f"{path}: no such config file.{nearest(path, known)}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: not a Python file; a config file ends in .py.")
    module = importlib.util.module_from_spec(spec)
    with _naming_line(path):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _naming_line(path: str) -> Iterator[None]:
    """Whatever a config file raises, in one line that begins with the file and the line in it."""
    try:
        yield
    except Exception as error:
        frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError):
            frames.append((error.filename, error.lineno))
        lines = [line for file, line in frames if file and Path(file).resolve() == Path(path).resolve()]
        place = f"{path}:{lines[-1]}" if lines else path
        raise UserError(f"{place}: {describe(error)}.") from error


def _override(config: dict[str, Any], key: str, text: str) -> None:
    """Sets one dotted key. In a named section any key may be set: its function judges it later."""
    *parents, last = parts = key.split(".")
    stages = _stages(config)
    own = [name for name, stage in stages.items() if parts[0] in stage]
    places = ", ".join(f"config.stages.{name}.{key}" for name in own)
    if own and len(own) == len(stages):
        raise UserError(f"config.{key}: every stage sets its own; set {places}.")
    if own:
        logger.warning("config.%s: stages %s keep their own; set %s for them.", key, ", ".join(own), places)
    section, path = config, "config"
    for parent in parents:
        section, path = section[_entry(section, parent, path)], f"{path}.{parent}"
        if not isinstance(section, (dict, list)):
            raise UserError(f"{path}: {section!r} is no section; set {path} itself.")
    is_config = section is config or (len(parents) == 2 and parents[0] == "stages")
    fields = [field.name for field in dataclasses.fields(Settings)] if is_config else []
    if isinstance(section, list):
        last = _entry(section, last, path)
    elif last not in section and last not in fields and "name" not in section:
        known = sorted({*section, *fields})
        raise UserError(f"{path}.{last}: no such key.{nearest(last, known)} There are: {', '.join(known)}.")
    section[last] = _parse(text, f"{path}.{last}")


def _entry(section: dict[str, Any] | list[Any], part: str, path: str) -> str | int:
    """The key or the index that a part of a dotted key means; it must be there."""
    if isinstance(section, list):
        if part.isdecimal() and int(part) < len(section):
            return int(part)
        raise UserError(f"{path}.{part}: no such entry; {path} has {len(section)}, counted from 0.")
    if part not in section:
        raise UserError(f"{path}.{part}: no such section.{nearest(part, section)}")
    return part


def _parse(text: str, path: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text
    return to_plain(value, path)


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(Settings)
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    }
    return {**defaults, **config}


def _stages(config: Mapping[str, Any]) -> dict[str, Any]:
    """The stages of a config that may be wrong in all else; {} where there are none."""
    stages = config.get("stages")
    if stages is None:
        return {}
    if not isinstance(stages, dict) or not stages or not all(isinstance(s, dict) for s in stages.values()):
        raise UserError(f"config.stages: expected a section for each stage, got {stages!r}.")
    for name in stages:
        if not re.fullmatch(r"\w[\w-]*", name) or name in _FOLDERS:
            raise UserError(
                f"config.stages: '{name}' cannot be a folder of the run; name a stage with letters, digits, _"
                f" and -, and not {', '.join(_FOLDERS)}."
            )
    return stages


def _stage_order(stages: Mapping[str, Any]) -> list[str]:
    """Each stage behind the one it starts from, else in the order written."""
    order: list[str] = []

    def add(name: str, below: tuple[str, ...]) -> None:
        path = f"config.stages.{name}.init_from"
        if name in below:
            raise UserError(f"{path}: stages start from each other in a circle.")
        for source in sources_of(stages[name].get("init_from", ""), path).values():
            if source not in stages:
                raise UserError(
                    f"{path}: no stage '{source}'.{nearest(source, stages)} Stages: {', '.join(stages)}."
                )
            if source not in order:
                add(source, (*below, name))
        if name not in order:
            order.append(name)

    for name in stages:
        add(name, ())
    return order
