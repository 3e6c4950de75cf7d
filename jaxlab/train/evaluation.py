"""Every evaluator on every replica, summarised over the seeds."""

import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
from jax.sharding import Mesh

from jaxlab.core import Batch, Evaluator, Outputs, State
from jaxlab.core.statistics import mean_and_stderr
from jaxlab.train import devices
from jaxlab.train.program import MakeMethod


class Summary(NamedTuple):
    """A metric over the seeds: `values` has an entry a seed, a float or a 1-D array."""

    mean: Any
    stderr: Any
    values: list[Any]


def make_evaluate(
    make_method: MakeMethod, evaluators: Mapping[str, Evaluator], mesh: Mesh
) -> Callable[[State, chex.ArrayTree], dict[str, Summary]]:
    """Returns `evaluate(states, handed_over) -> {"<evaluator>/<metric>": Summary}`, for replicas [seeds].

    A replica is on every device while it is evaluated, and its batches are split over them; in a run of
    several hosts all of them go through the same evaluation and get the same figures.
    """
    everywhere = devices.replicated(mesh)

    @jax.jit
    def compiled_predict(state: State, handed_over: Any, batch: Batch) -> Outputs:
        outputs = make_method(handed_over).predict(state, batch)
        return jax.lax.with_sharding_constraint(outputs, everywhere)

    pick = jax.jit(lambda tree, i: jax.tree.map(lambda x: x[i], tree), out_shardings=everywhere)

    def evaluate(states: State, handed_over: chex.ArrayTree) -> dict[str, Summary]:
        seeds = jax.tree.leaves(states)[0].shape[0]
        collected: dict[str, list[Any]] = {}
        for i in range(seeds):
            state, given = pick((states, handed_over), i)

            def predict(state: State, batch: Batch, given: Any = given) -> Outputs:
                batch = devices.put(batch, devices.batch_shardings(batch, mesh))
                return compiled_predict(state, given, batch)

            for name, evaluator in evaluators.items():
                for metric, value in evaluator.evaluate(predict, state).items():
                    collected.setdefault(f"{name}/{metric}", []).append(np.asarray(value, np.float64))
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
