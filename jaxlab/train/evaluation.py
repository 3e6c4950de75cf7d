"""Every evaluator on every replica, summarised over the seeds."""

import functools
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlab.core import Batch, Evaluator, Outputs, State, UserError
from jaxlab.core.resolve import describe
from jaxlab.core.statistics import mean_and_stderr
from jaxlab.train import devices


class Summary(NamedTuple):
    """A metric over the seeds: `values` has an entry a seed, a float or a 1-D array."""

    mean: Any
    stderr: Any
    values: list[Any]


def make_evaluate(
    predict: Callable[[State, Batch], Outputs], evaluators: Mapping[str, Evaluator], mesh: Mesh
) -> Callable[[State], dict[str, Summary]]:
    """Returns `evaluate(states) -> {"<evaluator>/<metric>": Summary}`, for states with leading axis [seeds].

    A replica is on every device of `devices.evaluation_mesh` while it is evaluated, and its batches are split
    over them; in a run of several hosts all of them go through the same evaluation and get the same figures.
    Evaluators are given one and the same `predict` for all seeds and evaluations, so that what they compile
    is compiled once.

    Raises:
      UserError: an evaluator failed, or gave other metrics for one seed than for another.
    """
    evaluation = devices.evaluation_mesh(mesh)
    everywhere = devices.replicated(evaluation)

    @jax.jit
    def compiled_predict(state: State, batch: Batch) -> Outputs:
        return jax.lax.with_sharding_constraint(predict(state, batch), everywhere)

    def predict_split(state: State, batch: Batch) -> Outputs:
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((state, batch))):
            return compiled_predict(state, batch)  # within what an evaluator compiles itself
        return compiled_predict(state, devices.put(batch, devices.batch_shardings(batch, evaluation)))

    @functools.partial(jax.jit, out_shardings=devices.replicated(mesh))
    def pick(states: State, i: int) -> State:
        return jax.tree.map(lambda x: x[i], states)

    def measure(name: str, evaluator: Evaluator, state: State) -> dict[str, Any]:
        try:
            return evaluator.evaluate(predict_split, state)
        except UserError as error:
            raise UserError(f"evaluators.{name}: {error}") from error
        except Exception as error:  # what data and network that do not fit it lead to
            raise UserError(f"evaluators.{name}: failed: {describe(error)}.") from error

    def evaluate(states: State) -> dict[str, Summary]:
        seeds = jax.tree.leaves(states)[0].shape[0]
        collected: dict[str, list[Any]] = {}
        for i in range(seeds):
            state = devices.put(pick(states, i), everywhere)
            for name, evaluator in evaluators.items():
                for metric, value in measure(name, evaluator, state).items():
                    collected.setdefault(f"{name}/{metric}", []).append(np.asarray(value, np.float64))
        for name, values in collected.items():
            if len(values) != seeds or len({value.shape for value in values}) > 1:
                raise UserError(f"evaluator metric '{name}': its seeds differ in presence or shape.")
        return {name: summarise(values) for name, values in collected.items()}

    return evaluate


def summarise(values: Sequence[Any]) -> Summary:
    return Summary(*mean_and_stderr(values), list(values))


def to_json(value: Any) -> Any:
    """What standard JSON can hold of a summary or an array: lists and floats, null for NaN and infinities."""
    if isinstance(value, Summary):
        return {key: to_json(v) for key, v in value._asdict().items()}
    if isinstance(value, Mapping):
        return {key: to_json(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic, float)):
        nested = np.asarray(value).tolist()
        if isinstance(nested, list):
            return [to_json(v) for v in nested]
        return nested if not isinstance(nested, float) or np.isfinite(nested) else None
    return value


def environment() -> dict[str, Any]:
    """What a result depends on beside its config."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
    }
