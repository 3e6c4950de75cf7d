"""From one config to the parts of a run: the only reader of configs.

Everything a config can get wrong is raised here as a `UserError`, before data are read or anything is
compiled.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import chex
import jax
import optax
from jax.sharding import Mesh

from jaxlab import config as configs
from jaxlab.config import Settings
from jaxlab.core import Batch, Evaluator, Method, Network, Outputs, State, Stream, UserError
from jaxlab.core.resolve import Plan, execute, plan
from jaxlab.train import devices
from jaxlab.train.checkpoints import Checkpoints
from jaxlab.train.program import MakeMethod, Program, make_program


class Parts(NamedTuple):
    """What a config describes, built.

    Attributes:
      settings: the config's flat keys.
      make_method: the method of one replica, from the variables handed over to it or None.
      stream: the training batches.
      evaluators: by name.
    """

    settings: Settings
    make_method: MakeMethod
    stream: Stream
    evaluators: dict[str, Evaluator]


class Run(NamedTuple):
    """A finished or running run, for notebooks and later stages.

    Attributes:
      config: as in its config.json.
      step: the step of the checkpoint that was read.
      method: its method.
      state: the method's states, leading axis [seeds].
      streams: {"train": Stream}.
      evaluators: by name.
      predict: `predict(state, batch) -> outputs`, compiled, with leading axis [seeds] on states and outputs.
    """

    config: dict[str, Any]
    step: int
    method: Method
    state: State
    streams: dict[str, Stream]
    evaluators: dict[str, Evaluator]
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

    def make_method(handed_over: Any) -> Method:
        arguments = dict(fixed)
        if handed_over is not None:
            arguments["network"] = _start_from(fixed["network"], handed_over, f"{path}.init_from")
        return plans["method"].function(**arguments)

    return Parts(
        settings,
        make_method,
        execute(plans["data"]),
        {name: execute(evaluator) for name, evaluator in plans["evaluators"].items()},
    )


def build_program(parts: Parts, mesh: Mesh, handed_over: chex.ArrayTree = None) -> Program:
    """The compiled program of a run's parts."""
    settings = parts.settings
    return make_program(
        parts.make_method,
        parts.stream,
        mesh=mesh,
        seed=settings.seed,
        seeds=settings.seeds,
        log_every=settings.log_every,
        steps_per_call=settings.steps_per_call,
        backend=settings.backend,
        handed_over=handed_over,
    )


def build_mesh(settings: Settings) -> Mesh:
    """The devices of a run."""
    axes = dict(settings.devices)
    if settings.backend == "pmap" and axes.get("data") == -1:
        axes["data"] = 1
    return devices.make_mesh(**axes, seeds=settings.seeds, batch_size=settings.batch_size)


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
        predict=jax.jit(jax.vmap(method.predict, in_axes=(0, None))),
    )


def _plans(settings: Settings, path: str) -> dict[str, Any]:
    """Checked plans of all sections. What sections share is injected: a function that has a parameter
    `batch_size`, `data_dir`, `num_classes`, `steps`, `network` or `optimizer` gets it from the config."""
    data_dir = {"data_dir": settings.data_dir or None}
    context: dict[str, Any] = {"steps": settings.steps}
    if settings.network is not None:
        context["network"] = plan("network", settings.network, f"{path}.network")
        if "num_classes" in settings.network:
            context["num_classes"] = settings.network["num_classes"]
    if settings.optimizer is not None:
        optimizer = plan("optimizer", settings.optimizer, f"{path}.optimizer")
        context["optimizer"] = Plan(_wrap_optimizer, {"optimizer": optimizer, "settings": settings})
    method = plan("method", settings.method, f"{path}.method", **context, **data_dir)
    if settings.init_from and "network" not in method.arguments:
        raise UserError(
            f"{path}.init_from: method '{settings.method['name']}' takes no network to start from."
        )
    return {
        "method": method,
        "data": plan("data", settings.data, f"{path}.data", batch_size=settings.batch_size, **data_dir),
        "evaluators": {
            name: plan("evaluator", section, f"{path}.evaluators.{name}", **data_dir)
            for name, section in settings.evaluators.items()
        },
    }


def _wrap_optimizer(
    optimizer: optax.GradientTransformation, settings: Settings
) -> optax.GradientTransformation:
    if settings.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)
    if settings.accumulate_steps > 1:
        optimizer = optax.MultiSteps(optimizer, settings.accumulate_steps).gradient_transformation()
    return optimizer


def _start_from(network: Network, variables: chex.ArrayTree, path: str) -> Network:
    """The network with `variables` in place of fresh ones."""

    def init(key: chex.PRNGKey, inputs: jax.Array) -> chex.ArrayTree:
        fresh = _shapes(jax.eval_shape(network.init, key, inputs))
        given = _shapes(variables)
        for name in sorted({*fresh, *given}):
            if fresh.get(name) != given.get(name):
                raise UserError(
                    f"{path}: what is handed over does not fit config.network: {name} is"
                    f" {given.get(name, 'absent')}, in the network {fresh.get(name, 'absent')}."
                )
        return variables

    return network._replace(init=init)


def _shapes(tree: chex.ArrayTree) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
