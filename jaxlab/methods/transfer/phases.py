"""Training in phases, of which linear probing, fine-tuning and one after the other consist.

Ananya Kumar, Aditi Raghunathan, Robbie Jones, Tengyu Ma, Percy Liang. *Fine-Tuning can Distort Pretrained
Features and Underperform Out-of-Distribution*. ICLR 2022 (arXiv 2202.10054). Official code:
AnanyaKumar/transfer_learning.

A phase has an optimizer of its own, which starts afresh, parameters that it trains, and a mode of batch
normalisation. In "eval" the whole network is as in evaluation, running statistics used and left alone, scales
and biases still trained: so the official code trains LP by gradient descent and both phases of LP-FT, while
plain FT has "train". With "train" the features would change before any gradient, and the head of LP not fit.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jaxlab.core import Batch, Method, Network, Outputs, UserError, Variables
from jaxlab.core.updates import gradient_update
from jaxlab.methods.transfer.trainable import HEAD, trainable_mask
from jaxlab.metrics.classification import correct, negative_log_likelihood

BatchNormMode = Literal["train", "eval"]
_WITHOUT_END = 2**31 - 1


class Phase(NamedTuple):
    """A part of training.

    Attributes:
      optimizer: counts its steps from the beginning of the phase, and so does a schedule in it.
      steps: its length; the last phase has no end.
      trainable: see `trainable_mask`.
      batch_norm: "train" normalises by the batch and moves the running statistics; "eval" does neither, and
        drops nothing out.
    """

    optimizer: optax.GradientTransformation
    steps: int | None = None
    trainable: str | tuple = "all"
    batch_norm: BatchNormMode = "eval"


class TransferState(NamedTuple):
    """What training in phases keeps.

    Attributes:
      variables: of the network.
      initial: those it started from, which `evaluation.feature_distortion` compares with.
      opt_states: the optimizer's of each phase.
      phase: int32, which phase the next update is of.
      phase_step: int32, how many updates of it were made.
    """

    variables: Variables
    initial: Variables
    opt_states: tuple[optax.OptState, ...]
    phase: jax.Array
    phase_step: jax.Array


def start_from(
    network: Network, pretrained_network: Network | None, key: chex.PRNGKey, inputs: jax.Array
) -> Variables:
    """The variables of a pretrained network with a fresh head, that of `network`.

    Without a pretrained network they are those that `network` starts from.

    Raises:
      UserError: the two networks differ in more than their heads.
    """
    fresh = network.init(key, inputs)
    if pretrained_network is None:
        return fresh
    pretrained = pretrained_network.init(key, inputs)
    if HEAD not in fresh["params"]:
        raise UserError("network: it has no layer 'head' to be made anew; give it num_classes.")
    merged = {**pretrained, "params": {**pretrained["params"], HEAD: fresh["params"][HEAD]}}
    if jax.tree.map(jnp.shape, merged) != jax.tree.map(jnp.shape, fresh):
        raise UserError(
            "pretrained_network: its encoder is not that of 'network'; give both the same layers."
        )
    return merged


def only(optimizer: optax.GradientTransformation, trainable: str | tuple) -> optax.GradientTransformation:
    """The optimizer on the parameters of `trainable_mask`, of which alone it keeps state; others stay."""

    def labels(params: chex.ArrayTree) -> chex.ArrayTree:
        return jax.tree.map(
            lambda trained: "trained" if trained else "frozen", trainable_mask(params, trainable)
        )

    return optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def in_phases(
    network: Network, phases: tuple[Phase, ...], *, pretrained_network: Network | None = None
) -> Method:
    """Trains a classifier in one phase after the other, on batches {"image": [B, ...], "label": [B]}.

    Which phase it is in stands in the state, so a run that was stopped goes on in it. Every update is the one
    compiled program. Where seeds are vmapped XLA computes the updates of all phases and selects; seeds that
    take turns (see `jaxlab.train.program`) compute one.

    Metrics: `loss` (mean cross-entropy, nats) and `accuracy` on the training batch, and `phase`, if there are
    several.

    Args:
      network: of the classifier, which starts from its `init`: in a config from init_from="<stage>".
      phases: at least one; all but the last have `steps`.
      pretrained_network: if given, all but the head starts from its `init`, and the head afresh: in a config,
        `init_from=dict(pretrained_network="<stage>")`. It may have another head, or none.

    Raises:
      UserError: no phase, a phase without steps before another, or names that no layer has.
    """
    if not phases:
        raise UserError("phases: give at least one.")
    for i, phase in enumerate(phases[:-1]):
        if not phase.steps or phase.steps < 1:
            raise UserError(f"phases.{i}.steps: expected 1 or more, got {phase.steps}.")
    optimizers = tuple(only(phase.optimizer, phase.trainable) for phase in phases)
    lengths = (*(phase.steps for phase in phases[:-1]), _WITHOUT_END)

    def init(key: chex.PRNGKey, batch: Batch) -> TransferState:
        variables = start_from(network, pretrained_network, key, batch["image"])
        opt_states = tuple(optimizer.init(variables["params"]) for optimizer in optimizers)
        zero = jnp.zeros((), jnp.int32)
        return TransferState(variables, variables, opt_states, zero, zero)

    def update_of(i: int) -> Callable[..., tuple[Variables, tuple, dict[str, jax.Array]]]:
        train, optimizer = phases[i].batch_norm == "train", optimizers[i]

        def update(
            state: TransferState, batch: Batch, key: chex.PRNGKey
        ) -> tuple[Variables, tuple, dict[str, jax.Array]]:
            def loss(variables: Variables) -> tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]:
                outputs, variables = network.apply(variables, batch["image"], train=train, key=key)
                value = jnp.mean(negative_log_likelihood(outputs["logits"], batch["label"]))
                return value, (variables, {"accuracy": jnp.mean(correct(outputs["logits"], batch["label"]))})

            # Afresh at the phase's own beginning: an optimizer may start from the parameters it finds there.
            fresh, kept = optimizer.init(state.variables["params"]), state.opt_states[i]
            opt_state = jax.tree.map(lambda x, y: jnp.where(state.phase_step == 0, x, y), fresh, kept)
            variables, opt_state, metrics = gradient_update(loss, optimizer, state.variables, opt_state)
            return variables, (*state.opt_states[:i], opt_state, *state.opt_states[i + 1 :]), metrics

        return update

    updates = [update_of(i) for i in range(len(phases))]

    def update(
        state: TransferState, batch: Batch, key: chex.PRNGKey
    ) -> tuple[TransferState, dict[str, jax.Array]]:
        variables, opt_states, metrics = jax.lax.switch(state.phase, updates, state, batch, key)
        is_over = state.phase_step + 1 >= jnp.asarray(lengths, jnp.int32)[state.phase]
        phase_step = jnp.where(is_over, 0, state.phase_step + 1)
        updated = TransferState(variables, state.initial, opt_states, state.phase + is_over, phase_step)
        return updated, metrics | ({"phase": state.phase} if len(phases) > 1 else {})

    return Method(init, update, lambda state, batch: predict(network, state, batch))


def predict(network: Network, state: TransferState, batch: Batch) -> Outputs:
    """Outputs of the network in evaluation."""
    return network.apply(state.variables, batch["image"], train=False)[0]


def unchanging(network: Network, variables_of: Callable[[chex.PRNGKey, Batch], tuple]) -> Method:
    """The method that computes its variables in `init` and then only measures them on the training batches.

    Metrics: `loss` (mean cross-entropy, nats) and `accuracy`.

    Args:
      network: a classifier.
      variables_of: `variables_of(key, batch) -> (variables, initial)`, see `TransferState`.
    """

    def init(key: chex.PRNGKey, batch: Batch) -> TransferState:
        zero = jnp.zeros((), jnp.int32)
        return TransferState(*variables_of(key, batch), (), zero, zero)

    def update(
        state: TransferState, batch: Batch, key: chex.PRNGKey
    ) -> tuple[TransferState, dict[str, jax.Array]]:
        logits, labels = predict(network, state, batch)["logits"], batch["label"]
        loss = jnp.mean(negative_log_likelihood(logits, labels))
        return state, {"loss": loss, "accuracy": jnp.mean(correct(logits, labels))}

    return Method(init, update, lambda state, batch: predict(network, state, batch))
