"""A config file, read and completed: plain dicts in the order written, defaults filled in.

What its sections name is checked in `jaxlab.experiment`.
"""

import ast
import dataclasses
import importlib.util
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_collections

from jaxlab.core import UserError
from jaxlab.core.errors import nearest
from jaxlab.core.resolve import check_arguments


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
        starts from; "": fresh ones.
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
    init_from: str = ""


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
    try:
        config = get_config(*arguments.split(",")) if arguments else get_config()
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path}: get_config({arguments!r}) failed: {error}.") from error
    return complete(config, overrides)


def complete(config: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A config as plain dicts, with overrides applied, defaults filled in and stages in running order.

    Raises:
      UserError: unknown, missing or misspelt keys, or values of the wrong type.
    """
    config = _with_defaults(to_plain(config))
    for key, value in (overrides or {}).items():
        _override(config, key, value)
    stages = config.pop("stages", None)
    if stages is None:
        settings_of(config)
        return config
    if (
        not isinstance(stages, Mapping)
        or not stages
        or not all(isinstance(s, Mapping) for s in stages.values())
    ):
        raise UserError(f"config.stages: expected a section for each stage, got {stages!r}.")
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
    for key in (
        "steps",
        "batch_size",
        "seeds",
        "log_every",
        "max_to_keep",
        "accumulate_steps",
        "steps_per_call",
    ):
        if getattr(settings, key) < 1:
            raise UserError(f"{path}.{key}: expected 1 or more, got {getattr(settings, key)}.")
    for key in ("seed", "eval_every", "checkpoint_every", "clip_norm"):
        if getattr(settings, key) < 0:
            raise UserError(f"{path}.{key}: expected 0 or more, got {getattr(settings, key)}.")
    check_arguments(lambda seed, data: None, settings.devices, f"{path}.devices", "the mesh")
    return settings


def to_plain(value: Any) -> Any:
    """A ConfigDict as plain dicts and lists, as it is written to JSON; the order of keys is kept."""
    if isinstance(value, ml_collections.ConfigDict):
        value = dict(value.items())
    if isinstance(value, Mapping):
        return {str(key): to_plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value


def _import_file(path: str) -> types.ModuleType:
    if not Path(path).is_file():
        known = [str(p) for p in Path("configs").rglob("*.py") if p.name != "__init__.py"]
        raise UserError(f"{path}: no such config file.{nearest(path, known)}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: not a Python file; a config file ends in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise UserError(f"{path}: cannot be imported: {error}.") from error
    return module


def _override(config: dict[str, Any], key: str, text: str) -> None:
    """Sets one dotted key. In a named section any key may be set: its function judges it later."""
    *parents, last = key.split(".")
    stages = config.get("stages") or {}
    if stages and all(key.split(".")[0] in stage for stage in stages.values()):
        places = ", ".join(f"config.stages.{name}.{key}" for name in stages)
        raise UserError(f"config.{key}: every stage sets its own; set {places}.")
    section, path = config, "config"
    for parent in parents:
        if not isinstance(section.get(parent), dict):
            raise UserError(f"{path}.{parent}: no such section.{nearest(parent, section)}")
        section, path = section[parent], f"{path}.{parent}"
    is_config = section is config or (path.startswith("config.stages.") and path.count(".") == 2)
    fields = [field.name for field in dataclasses.fields(Settings)] if is_config else []
    if last not in section and last not in fields and "name" not in section:
        known = sorted({*section, *fields})
        raise UserError(f"{path}.{last}: no such key.{nearest(last, known)} There are: {', '.join(known)}.")
    section[last] = _parse(text)


def _parse(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return to_plain(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return text


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(Settings)
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    }
    return {**defaults, **config}


def _stage_order(stages: Mapping[str, Any]) -> list[str]:
    """Each stage behind the one it starts from, else in the order written."""
    order: list[str] = []

    def add(name: str, below: tuple[str, ...]) -> None:
        source = stages[name].get("init_from", "")
        if source and source not in stages:
            raise UserError(
                f"config.stages.{name}.init_from: no stage '{source}'.{nearest(source, stages)}"
                f" Stages: {', '.join(stages)}."
            )
        if name in below:
            raise UserError(f"config.stages.{name}.init_from: stages start from each other in a circle.")
        if source and source not in order:
            add(source, (*below, name))
        if name not in order:
            order.append(name)

    for name in stages:
        add(name, ())
    return order
