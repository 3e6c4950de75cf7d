"""From one config to the parts of a run: the only reader of configs.

Everything a config can get wrong is raised here as a `UserError`, before data are read or anything is
compiled.
"""

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import chex
import jax
import optax
from jax.sharding import Mesh

from jaxlab import config as configs
from jaxlab.config import Settings
from jaxlab.core import (
    Batch,
    Evaluator,
    Method,
    Network,
    Outputs,
    State,
    Stream,
    TrainedNetwork,
    UserError,
)
from jaxlab.core.errors import nearest
from jaxlab.core.resolve import Plan, execute, plan, type_hints
from jaxlab.train import devices
from jaxlab.train.checkpoints import Checkpoints
from jaxlab.train.program import MakeMethod, Program, check_fit, make_program


class Parts(NamedTuple):
    """What a config describes, built.

    Attributes:
      settings: the config's flat keys.
      make_method: the method of one replica, from the variables handed over to it (parameter of the method
        → variables of that network) or None.
      stream: the training batches.
      evaluators: by name.
      definitions: what each evaluator was told, its defaults included: numbers, text and lists by key.
    """

    settings: Settings
    make_method: MakeMethod
    stream: Stream
    evaluators: dict[str, Evaluator]
    definitions: dict[str, dict[str, Any]]


class Run(NamedTuple):
    """A finished or running run, for notebooks and later stages.

    Attributes:
      config: as in its config.json.
      step: the step of the checkpoint that was read.
      method: its method.
      state: the method's states, leading axis [seeds].
      streams: {"train": Stream}.
      evaluators: by name.
      definitions: as in `Parts`.
      predict: `predict(state, batch) -> outputs`, compiled, with leading axis [seeds] on states and outputs.
    """

    config: dict[str, Any]
    step: int
    method: Method
    state: State
    streams: dict[str, Stream]
    evaluators: dict[str, Evaluator]
    definitions: dict[str, dict[str, Any]]
    predict: Callable[[State, Batch], Outputs]


def load_config(path_and_size: str, overrides: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Reads a config file as `jaxlab.config.read_file` does, and checks every name and key in its sections.

    Raises:
      UserError: anything in the config is wrong.
    """
    config = configs.read_file(path_and_size, overrides)
    for stage, stage_config in (configs.stage_configs(config) or {"": config}).items():
        _plans(configs.settings_of(stage_config, stage), configs.place(stage))
    return config


def build_parts(config: Mapping[str, Any], stage: str = "") -> Parts:
    """Builds the parts of a checked config; this reads the data."""
    path = configs.place(stage)
    settings = configs.settings_of(config, stage)
    plans = _plans(settings, path)
    fixed = {key: execute(value) for key, value in plans["method"].arguments.items()}
    method = execute(plans["method"]._replace(arguments=fixed))

    def make_method(handed_over: Any) -> Method:
        if handed_over is None:
            return method
        networks = {name: _start_from(fixed[name], variables) for name, variables in handed_over.items()}
        # A builder may compute: it is called under tracing here, but not traced.
        with jax.ensure_compile_time_eval():
            return execute(plans["method"]._replace(arguments={**fixed, **networks}))

    stream = execute(plans["data"])
    if not isinstance(stream, Stream):
        raise UserError(f"{path}.data: '{settings.data['name']}' builds no Stream; put it into one.")
    return Parts(
        settings,
        make_method,
        stream,
        {name: execute(evaluator) for name, evaluator in plans["evaluators"].items()},
        {name: _definition(evaluator) for name, evaluator in plans["evaluators"].items()},
    )


def check_stages(config: Mapping[str, Any]) -> None:
    """Builds every stage of a config and fits their shapes together, so that none fails behind the others.

    Raises:
      UserError: a stage cannot be built on these devices, or not from what it starts from.
    """
    variables: dict[str, Any] = {}
    for stage, stage_config in configs.stage_configs(config).items():
        parts = build_parts(stage_config, stage)
        build_mesh(parts.settings, stage)
        sources = parts.settings.sources
        for source in sources.values():
            seeds = config["stages"][source].get("seeds", config["seeds"])
            _check_seeds(source, seeds, parts.settings, stage)
        handed_over = {name: variables[source] for name, source in sources.items()}
        with _place_in_errors(stage):
            state, _ = check_fit(parts.make_method, parts.stream, handed_over or None)
        variables[stage] = state.variables


def build_program(
    parts: Parts, mesh: Mesh, *, stage: str = "", handed_over: chex.ArrayTree = None
) -> Program:
    """The compiled program of a run's parts."""
    settings = parts.settings
    with _place_in_errors(stage):
        return make_program(
            parts.make_method,
            parts.stream,
            mesh=mesh,
            seed=settings.seed,
            seeds=settings.seeds,
            log_every=settings.log_every,
            steps_per_call=settings.steps_per_call,
            backend=settings.backend,
            stage=stage,
            handed_over=handed_over,
        )


def build_mesh(settings: Settings, stage: str = "") -> Mesh:
    """The devices of a run."""
    axes = dict(settings.devices)
    if settings.backend == "pmap" and axes.get("data") == -1:
        axes["data"] = 1
    return devices.make_mesh(
        **axes, seeds=settings.seeds, batch_size=settings.batch_size, place=configs.place(stage)
    )


def open_checkpoints(workdir: Path, config: Mapping[str, Any], *, read_only: bool = False) -> Checkpoints:
    """The checkpoints of a run's folder."""
    settings = configs.settings_of(config)
    return Checkpoints(
        workdir.absolute() / "checkpoints",
        config,
        max_to_keep=settings.max_to_keep,
        best_metric=settings.best_metric,
        best_mode=settings.best_mode,
        read_only=read_only,
    )


def read_result(workdir: Path) -> dict[str, Any] | None:
    """The result of a finished run, None for any other."""
    try:
        result = json.loads((workdir / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return result if result.get("status") == "complete" else None


def final_variables(workdir: Path, mesh: Mesh, settings: Settings, stage: str = "") -> chex.ArrayTree:
    """What a finished run hands over to the one with `settings`: its variables, leading axis [seeds].

    Raises:
      UserError: the run is not finished, its last checkpoint cannot be read, or it has other seeds.
    """
    source = configs.read_config(workdir)
    if read_result(workdir) is None:
        raise UserError(f"{workdir}: this run is not finished; finish it first.")
    _check_seeds(workdir.name, source["seeds"], settings, stage)
    return load(workdir, source["steps"], mesh=mesh).state.variables


def load(workdir: str | Path, step: int | Literal["best"] | None = None, *, mesh: Mesh | None = None) -> Run:
    """Loads a run from its folder. Nothing in the folder is changed.

    Args:
      workdir: the folder of a run, or of a stage of one.
      step: which checkpoint; "best" for the best by config.best_metric, the newest if None.
      mesh: the devices to load it on; one if None.

    Raises:
      UserError: no run there, no such checkpoint, or the run has stages and none was chosen.
    """
    workdir = Path(workdir)
    config = configs.read_config(workdir)
    if "stages" in config:
        raise UserError(f"{workdir}: this run has stages; load one of {', '.join(config['stages'])} in it.")
    parts = build_parts(config)
    if mesh is None:
        mesh = devices.make_mesh(1, 1, seeds=parts.settings.seeds, batch_size=parts.settings.batch_size)
    program = build_program(parts, mesh)
    checkpoints = open_checkpoints(workdir, config, read_only=True)
    restored = checkpoints.restore(program.abstract(), checkpoints.best_step() if step == "best" else step)
    if restored is None:
        raise UserError(f"{workdir}: no checkpoint that can be read; start the run with launch.train.")
    method = parts.make_method(None)
    return Run(
        config=config,
        step=restored[0],
        method=method,
        state=restored[1].state,
        streams={"train": parts.stream},
        evaluators=parts.evaluators,
        definitions=parts.definitions,
        predict=jax.jit(jax.vmap(method.predict, in_axes=(0, None))),
    )


def _plans(settings: Settings, path: str) -> dict[str, Any]:
    """Checked plans of all sections.

    What they share is injected where a function has a parameter of that name and the section leaves it
    out: `data_dir` everywhere, `batch_size` in data, and `network`, `optimizer`, `steps` and `num_classes`
    in methods.
    """
    data_dir = {"data_dir": settings.data_dir or None}
    context: dict[str, Any] = {"steps": settings.steps}
    if settings.network is not None:
        context["network"] = plan("network", settings.network, f"{path}.network")
        if settings.network.get("num_classes") is not None:
            context["num_classes"] = settings.network["num_classes"]
    if settings.optimizer is not None:
        optimizer = plan("optimizer", settings.optimizer, f"{path}.optimizer")
        wrapped = {"optimizer": optimizer, "settings": settings}
        context["optimizer"] = Plan(_wrap_optimizer, wrapped, f"{path}.optimizer", "optimizer")
    method = plan("method", settings.method, f"{path}.method", **context, **data_dir)
    if (settings.clip_norm or settings.accumulate_steps > 1) and "optimizer" not in method.arguments:
        raise UserError(
            f"{path}: clip_norm and accumulate_steps go with config.optimizer, which method"
            f" '{settings.method['name']}' does not take; put them into its own optimizers."
        )
    evaluator = settings.best_metric.split("/")[0]
    if evaluator and evaluator not in settings.evaluators:
        known = ", ".join(settings.evaluators) or "none"
        raise UserError(
            f"{path}.best_metric: no evaluator '{evaluator}'; expected <evaluator>/<metric>,"
            f" evaluators: {known}."
        )
    networks = [k for k, v in method.arguments.items() if isinstance(v, Plan) and v.kind == "network"]
    if isinstance(settings.init_from, str) and settings.init_from and len(networks) > 1:
        raise UserError(
            f"{path}.init_from: method '{settings.method['name']}' has several networks"
            f" ({', '.join(networks)}); say which starts from it: dict(<network>='{settings.init_from}')."
        )
    for name in settings.sources:
        if name not in networks:
            raise UserError(
                f"{path}.init_from: method '{settings.method['name']}' has no network '{name}' to start from."
                f"{nearest(name, networks)} It has: {', '.join(networks) or 'none'}."
            )
    for name, hint in type_hints(method.function).items():
        if hint is TrainedNetwork and name not in settings.sources:
            raise UserError(
                f"{path}.init_from: method '{settings.method['name']}' needs a trained '{name}': give"
                f" init_from=dict({name}='<stage>')."
            )
    return {
        "method": method,
        "data": plan("data", settings.data, f"{path}.data", batch_size=settings.batch_size, **data_dir),
        "evaluators": {
            name: plan("evaluator", section, f"{path}.evaluators.{name}", **data_dir)
            for name, section in settings.evaluators.items()
        },
    }


def _definition(evaluator: Plan) -> dict[str, Any]:
    """The plain arguments of a planned call, and the plain defaults of those that are left out."""
    parameters = inspect.signature(evaluator.function).parameters
    values = {name: evaluator.arguments.get(name, p.default) for name, p in parameters.items()}
    return {name: value for name, value in values.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _wrap_optimizer(
    optimizer: optax.GradientTransformation, settings: Settings
) -> optax.GradientTransformation:
    if settings.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)
    if settings.accumulate_steps > 1:
        optimizer = optax.MultiSteps(optimizer, settings.accumulate_steps).gradient_transformation()
    return optimizer


def _check_seeds(source: str, source_seeds: int, settings: Settings, stage: str) -> None:
    if source_seeds != settings.seeds:
        raise UserError(
            f"{configs.place(stage)}.init_from: '{source}' has {source_seeds} seeds"
            f" and this run {settings.seeds}; give both the same."
        )


@contextlib.contextmanager
def _place_in_errors(stage: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if str(error).startswith("config"):
            raise
        raise UserError(f"{configs.place(stage)}: {error}") from error


def _start_from(network: Network, variables: chex.ArrayTree) -> Network:
    """The network with `variables` in place of fresh ones."""

    def init(key: chex.PRNGKey, inputs: jax.Array) -> chex.ArrayTree:
        fresh = _shapes(jax.eval_shape(network.init, key, inputs))
        given = _shapes(variables)
        for name in sorted({*fresh, *given}):
            if fresh.get(name) != given.get(name):
                raise UserError(
                    f"init_from: what is handed over does not fit the network: {name} is"
                    f" {given.get(name, 'absent')}, in the network {fresh.get(name, 'absent')}."
                )
        return variables

    return network._replace(init=init)


def _shapes(tree: chex.ArrayTree) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
