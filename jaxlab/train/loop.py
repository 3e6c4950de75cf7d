"""The training loop: one for every method.

It knows steps and events; what a step is, the program knows. Everything it does between two calls is a
function of the step, so that a run that was killed and one that was not take the same way.
"""

import collections
import functools
import itertools
import logging
import signal
import types
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxlab.core import State, UserError
from jaxlab.train import devices
from jaxlab.train.checkpoints import Checkpoints
from jaxlab.train.evaluation import Summary
from jaxlab.train.program import Program, Replica
from jaxlab.train.writers import MetricWriter, ProgressLine

logger = logging.getLogger(__name__)

# How many calls the host may be ahead of the device: enough to hide the host, few enough to stop soon.
CALLS_AHEAD = 2


class DivergenceError(UserError):
    """A metric or the state is not finite any more."""

    status = 1

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Interrupted(Exception):
    """The run was asked to stop by a signal, and has stopped with a checkpoint."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}")
        self.signal_number, self.step = signal_number, step


def train(
    program: Program,
    checkpoints: Checkpoints,
    evaluate: Callable[[State], dict[str, Summary]],
    *,
    workdir: Path,
    title: str,
    first_seed: int,
    steps: int,
    log_every: int,
    eval_every: int,
    checkpoint_every: int,
    save_evaluated: bool = False,
    stop_signal: Callable[[], int] = lambda: 0,
) -> tuple[State, dict[str, Summary]]:
    """Trains from the newest readable checkpoint, or from the beginning, to `steps`.

    Args:
      program: the compiled run.
      checkpoints: where its checkpoints are.
      evaluate: from the states of all replicas to summaries.
      workdir: where `metrics.jsonl` is written.
      title: what the progress line calls the run.
      first_seed: the seed of the first replica, for messages.
      steps: how many training steps.
      log_every: training metrics are averaged over this many steps and logged.
      eval_every: evaluations are this many steps apart; 0 for one at the end.
      checkpoint_every: likewise for checkpoints.
      save_evaluated: also write a checkpoint at every evaluation, for the best of them to be kept.
      stop_signal: tells which signal has come, or 0; see `noting_signals`.

    Returns:
      The states, leading axis [seeds], and the evaluation after the last step.

    Raises:
      DivergenceError: a metric was not finite, or the state holds NaN.
      Interrupted: SIGTERM or SIGINT came; a checkpoint is written.
    """
    primary = jax.process_index() == 0
    restored = checkpoints.restore(program.abstract())
    step, replicas = (0, program.init()) if restored is None else (restored[0], program.scatter(restored[1]))
    if step:
        logger.info("%s: going on from the checkpoint of step %d", title, step)
    final = None
    periods = [every for every in (log_every, eval_every, checkpoint_every) if every]
    with (
        closing(MetricWriter(workdir, step, primary=primary)) as writer,
        closing(ProgressLine(title, step, steps, primary=primary)) as progress,
        closing(program.host_batches(step, steps)) as host_batches,
    ):
        in_flight: collections.deque[jax.Array] = collections.deque()
        while step < steps:
            event = min(steps, *(step - step % every + every for every in periods))
            num_steps = min(event - step, program.steps_per_call)
            replicas, done = program.call(replicas, step, num_steps, next(host_batches))
            step += num_steps
            in_flight.append(done)
            if len(in_flight) > CALLS_AHEAD:
                in_flight.popleft().block_until_ready()
            progress.advance(step)

            logs = step % log_every == 0 or step == steps
            evaluates = step == steps or bool(eval_every and step % eval_every == 0)
            stops = stop_signal()
            saves = step == steps or bool(stops) or bool(checkpoint_every and step % checkpoint_every == 0)
            saves |= evaluates and save_evaluated
            if not (logs or evaluates or saves):
                continue
            gathered = program.gather(replicas)
            _check_finite(gathered, step, first_seed, checkpoints, state_too=saves)
            if logs:
                averaged = (step - 1) % log_every + 1
                metrics = {
                    name: devices.fetch(sums) / averaged for name, sums in gathered.metric_sums.items()
                }
                rate = progress.log(step, metrics)
                devices.on_primary(
                    functools.partial(writer.write, step, "train", metrics, steps_per_second=rate)
                )
            means = None
            if evaluates:
                final = evaluate(gathered.state)
                scalars = {name: np.asarray(s.values) for name, s in final.items() if np.ndim(s.mean) == 0}
                means = {name: float(np.mean(values)) for name, values in scalars.items()}
                devices.on_primary(functools.partial(writer.write, step, "eval", scalars))
            if saves:
                devices.on_primary(writer.sync)
                checkpoints.save(step, gathered, means)
            if stops and step < steps:
                checkpoints.wait()
                raise Interrupted(stops, step)
            progress.resume()
    state = program.gather(replicas).state
    checkpoints.wait()
    return state, evaluate(state) if final is None else final


def _check_finite(
    replicas: Replica, step: int, first_seed: int, checkpoints: Checkpoints, *, state_too: bool
) -> None:
    bad = {name: devices.fetch(steps) for name, steps in replicas.bad_step.items()}
    found = [(s, name, i) for name, steps in bad.items() for i, s in enumerate(steps) if s >= 0]
    if found:
        bad_step, name, i = min(found)
        what = f"'{name}' is not finite at step {bad_step} of seed {first_seed + i}"
    elif state_too and (seeds := np.flatnonzero(devices.fetch(_has_nan(replicas.state)))).size:
        what = f"the state of seed {first_seed + seeds[0]} holds NaN"
    else:
        return
    checkpoints.wait()
    good = max(checkpoints.steps(), default=None)
    kept = "there is no checkpoint yet" if good is None else f"the checkpoint of step {good} is good"
    message = f"training diverged: {what}; {kept}. Lower the learning rate or clip gradients."
    raise DivergenceError(message, step)


@jax.jit
def _has_nan(states: chex.ArrayTree) -> jax.Array:
    """For each replica [seeds], whether any of its floats is NaN."""
    floats = [x for x in jax.tree.leaves(states) if jnp.issubdtype(x.dtype, jnp.floating)]
    seeds = len(jax.tree.leaves(states)[0])
    per_leaf = [jnp.isnan(x).reshape(seeds, -1).any(axis=1) for x in floats]
    return jnp.any(jnp.stack([jnp.zeros(seeds, bool), *per_leaf]), axis=0)


@contextmanager
def noting_signals() -> Iterator[Callable[[], int]]:
    """Within it, SIGTERM and SIGINT are noted; the yielded function tells which one came, or 0.

    A second one ends the process as it would have without. Several hosts must stop at the same step, so
    there the signals are JAX's own: its preemption service passes them on, at a call of the function that
    is the same on every host.
    """
    received, calls = 0, itertools.count(1)
    previous: dict[int, Any] = {}

    def note(number: int, frame: types.FrameType | None) -> None:
        nonlocal received
        del frame
        received = number
        for each, handler in previous.items():
            signal.signal(each, handler)

    def came() -> int:
        if jax.process_count() > 1:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(next(calls)) else 0
        return received

    if jax.process_count() == 1:
        previous |= {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
