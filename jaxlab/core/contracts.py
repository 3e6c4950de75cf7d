"""The four contracts between the parts of jaxlab, each a NamedTuple of pure functions.

A part never sees more of another part than these. All of them can be written by hand in a test or a
notebook; none has a base class, a registry or hidden state.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NewType, Protocol

import chex
import jax

Batch = Mapping[str, Any]  # arrays (or mappings of arrays) with the batch axis first
Outputs = Mapping[str, chex.ArrayTree]
Variables = Mapping[str, chex.ArrayTree]  # {"params": ..., "batch_stats": ...}


class State(Protocol):
    """What a method keeps between steps: any pytree that has the variables `predict` uses."""

    variables: Variables


class Network(NamedTuple):
    """A neural network, whatever library it was written in.

    Attributes:
      init: `init(key, inputs) -> variables`; inputs are an array, or a tree of them.
      apply: `apply(variables, inputs, *, train, key=None) -> (outputs, variables)`. `outputs` of a
        classifier always hold `"logits"` [B, K] and `"features"` [B, F]. The returned variables carry
        updated batch statistics and are the same object where there are none to update. `key` drives
        dropout.
    """

    init: Callable[[chex.PRNGKey, chex.ArrayTree], Variables]
    apply: Callable[..., tuple[Outputs, Variables]]


# A network whose `init` returns variables that were trained, the type of a builder's parameter that must be
# handed over: in a config, `init_from=dict(<parameter>="<stage>")`.
TrainedNetwork = NewType("TrainedNetwork", Network)


class Method(NamedTuple):
    """A learning algorithm. `update` is written for the global batch, as if there were one device.

    Attributes:
      init: `init(key, batch) -> state`, a pytree with a field `variables`.
      update: `update(state, batch, key) -> (state, metrics)`, one step. `metrics` is a dict of finite
        scalars; the training loop stops at the first one that is not finite.
      predict: `predict(state, batch) -> outputs`, deterministic.
    """

    init: Callable[[chex.PRNGKey, Batch], State]
    update: Callable[[State, Batch, chex.PRNGKey], tuple[State, dict[str, jax.Array]]]
    predict: Callable[[State, Batch], Outputs]


class Stream(NamedTuple):
    """An endless sequence of training batches, addressed by step and hence resumable.

    Attributes:
      batch: `batch(step, key) -> batch`, a pure function of the step and of a key that stays the same
        for the whole run. Where `on_device`, it is traced into the training program; otherwise it
        runs on the host, ahead of the step that needs it, and returns NumPy arrays.
      on_device: whether `batch` can be traced.
    """

    batch: Callable[[Any, chex.PRNGKey], Batch]
    on_device: bool


class Evaluator(NamedTuple):
    """A measurement of one trained replica.

    Attributes:
      evaluate: `evaluate(predict, state) -> {metric: value}`; `predict` is compiled, a value is a
        number or a 1-D array (a curve).
      plot: optional; `plot(results) -> {name: matplotlib figure}`, where `results[metric]` is a dict
        with `mean`, `stderr` and `values` (one entry a seed). It draws what a table cannot show.
    """

    evaluate: Callable[[Callable[[State, Batch], Outputs], State], dict[str, Any]]
    plot: Callable[[Mapping[str, Mapping[str, Any]]], dict[str, Any]] | None = None
