"""Learning from Failure: a biased classifier tells which examples a debiased one should learn from.

Junhyun Nam, Hyuntak Cha, Sungsoo Ahn, Jaeho Lee, Jinwoo Shin. *Learning from Failure: Training Debiased
Classifier from Biased Classifier*. NeurIPS 2020 (arXiv 2007.02561). Official code: alinlab/LfF.

Two networks train on the same batches. The biased one, B, has the generalised cross entropy (Zhang &
Sabuncu, NeurIPS 2018), which strengthens what it already finds easy; the debiased one, D, has the cross
entropy weighted by the relative difficulty W of each example, near 1 where B fails and D does not. No
attribute label is used.

Where the paper and its code differ, this follows the code, which the reported numbers come from:

- W is not CE_B / (CE_B + CE_D) of the batch. It is taken of exponential moving averages of each example's
  losses, one update a visit and 0.7 the weight of the *old* value, each divided by its maximum over the
  training examples of the same class. B's average too is of the plain cross entropy.
- The generalised cross entropy is q sg(p_y)^q CE, which has q times the gradient of (1 - p_y^q) / q, but
  another value, no monotone function of p_y. Under Adam the factor q cancels.
- The weighted losses of D are divided by the number of examples, not by the sum of their weights.

One point is not the code's: where all averages of a class are zero, it stops at 0 / 0; here they stay 0.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.core import Batch, Method, Network, Outputs, UserError, Variables
from jaxlab.core.updates import apply_gradient
from jaxlab.metrics.classification import correct, negative_log_likelihood
from jaxlab.metrics.reductions import masked_mean


def generalized_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    q: float = 0.7,
    form: Literal["stop_gradient", "textbook"] = "stop_gradient",
) -> jax.Array:
    """Cross entropy, in nats, whose gradient is scaled by p_y^q (Zhang & Sabuncu, 2018); [B, C], [B] -> [B].

    Args:
      logits: [B, C].
      labels: [B] integers.
      q: in (0, 1]. The textbook form tends to the cross entropy for q -> 0, the other one to 0.
      form: "stop_gradient", q sg(p_y)^q CE as in the official code, or "textbook", (1 - p_y^q) / q. The
        gradients are q p_y^q (p - 1[y]) and p_y^q (p - 1[y]).

    Raises:
      UserError: unknown `form`.
    """
    cross_entropy = negative_log_likelihood(logits, labels)
    if form == "stop_gradient":
        return q * jax.lax.stop_gradient(jnp.exp(-q * cross_entropy)) * cross_entropy
    if form == "textbook":
        return -jnp.expm1(-q * cross_entropy) / q
    raise UserError(f"form: expected 'stop_gradient' or 'textbook', got {form!r}.")


BiasedLoss = Literal["generalized_cross_entropy", "cross_entropy"]
Difficulty = Literal["memory", "batch"]


class LossMemory(NamedTuple):
    """Moving average of each training example's loss.

    Attributes:
      value: [N] float32, 0 until an example is seen.
      seen: [N] bool.
    """

    value: jax.Array
    seen: jax.Array


def init_loss_memory(num_examples: int) -> LossMemory:
    """The memory of N examples that have not been seen."""
    return LossMemory(jnp.zeros(num_examples, jnp.float32), jnp.zeros(num_examples, bool))


def update_loss_memory(mem: LossMemory, index: jax.Array, loss: jax.Array, decay: float = 0.7) -> LossMemory:
    """Moves the average of each example of the batch towards its loss.

    The first loss of an example is taken as it is; later ones give `decay * value + (1 - decay) * loss`.
    Where a batch has an example twice (it may straddle two epochs), the last one counts, as in PyTorch's
    indexed assignment. No gradient flows into the memory.

    Args:
      mem: of N examples.
      index: [B] integers, the examples; those outside 0..N - 1 are dropped.
      loss: [B], not negative.
      decay: weight of the old value, in [0, 1).
    """
    chex.assert_equal_shape([index, loss])
    row = jax.ops.segment_max(jnp.arange(len(index)), index, len(mem.value))  # negative where not visited
    visited = row >= 0
    latest = jax.lax.stop_gradient(loss)[row]
    moved = jnp.where(mem.seen, decay * mem.value + (1 - decay) * latest, latest)
    return LossMemory(jnp.where(visited, moved, mem.value), mem.seen | visited)


def class_max(value: jax.Array, labels_all: jax.Array, num_classes: int) -> jax.Array:
    """Largest of the values >= 0 of each class, 0 where it has none; [N], [N] -> [C]."""
    chex.assert_equal_shape([value, labels_all])
    return jnp.maximum(jax.ops.segment_max(value, labels_all, num_classes), 0)


def relative_difficulty(
    mem_b: LossMemory,
    mem_d: LossMemory,
    index: jax.Array,
    labels: jax.Array,
    labels_all: jax.Array,
    num_classes: int,
    eps: float = 1e-8,
    max_eps: float = 0.0,
) -> jax.Array:
    """W = b / (b + d + eps), b and d being the averages as fractions of their class's maximum.

    Args:
      mem_b: of network B, updated with this batch.
      mem_d: likewise of network D.
      index: [B] integers, the examples; one past the end has W = 0.
      labels: [B] integers, `labels_all[index]`.
      labels_all: [N] integers, the labels of the training set.
      num_classes: C.
      eps: of the denominator.
      max_eps: least value of a class's maximum. Where that is 0, the fractions are 0.

    Returns:
      [B] in [0, 1]. No gradient flows through it.
    """
    chex.assert_equal_shape([index, labels])

    def fraction(value: jax.Array) -> jax.Array:
        most = jnp.maximum(class_max(value, labels_all, num_classes)[labels], max_eps)
        return value.at[index].get(mode="fill", fill_value=0) / jnp.where(most > 0, most, 1)

    return _share(fraction(mem_b.value), fraction(mem_d.value), eps)


def _share(biased: jax.Array, debiased: jax.Array, eps: float) -> jax.Array:
    # XLA computes (x / most) / y as x / (most * y), which is 0 / 0 where that product underflows.
    return jax.lax.stop_gradient(jnp.where(biased > 0, biased / (biased + debiased + eps), 0))


def lff_losses(
    logits_b: jax.Array,
    logits_d: jax.Array,
    labels: jax.Array,
    weight: jax.Array,
    mask: jax.Array | None = None,
    *,
    biased_loss: Callable[[jax.Array, jax.Array], jax.Array] = generalized_cross_entropy,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The mean losses of both networks, Algorithm 1.

    Args:
      logits_b: [B, C] of network B.
      logits_d: [B, C] of network D.
      labels: [B] integers.
      weight: [B], W; taken as a constant.
      mask: [B] bool, false for rows that only fill up the batch; all are real if not given.
      biased_loss: `biased_loss(logits, labels) -> [B]`, the loss of network B.

    Returns:
      The mean of `biased_loss`; the mean of `weight` times the cross entropy of network D; and what they
      are means of, [B] each: `biased_loss` and `debiased_loss`.
    """
    chex.assert_equal_shape([logits_b, logits_d])
    chex.assert_equal_shape([labels, weight])
    per_example = {
        "biased_loss": biased_loss(logits_b, labels),
        "debiased_loss": jax.lax.stop_gradient(weight) * negative_log_likelihood(logits_d, labels),
    }
    loss_b, loss_d = (masked_mean(losses, mask) for losses in per_example.values())
    return loss_b, loss_d, per_example


class LffState(NamedTuple):
    """Variables, optimizer state and loss memory of the debiased network, and those of the biased one.

    `predict` uses `variables`; with `state._replace(variables=state.biased_variables)` it is the biased
    network that predicts.
    """

    variables: Variables
    opt_state: optax.OptState
    memory: LossMemory
    biased_variables: Variables
    biased_opt_state: optax.OptState
    biased_memory: LossMemory


class BiasedBatch(NamedTuple):
    """What the biased network learns from in place of the batch.

    Attributes:
      image: [B, ...].
      label: [B].
      mask: [B] bool, false for examples it does not learn from.
    """

    image: jax.Array
    label: jax.Array
    mask: jax.Array


def learn_from_failure(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    labels_all: np.ndarray,
    num_classes: int,
    decay: float,
    biased_loss: Callable[[jax.Array, jax.Array], jax.Array],
    difficulty: Difficulty = "memory",
    synthesize: Callable[[chex.PRNGKey, Batch], BiasedBatch] | None = None,
) -> Method:
    """Algorithm 1 with any loss of the biased network, and any data that it learns from.

    Args:
      network, optimizer, num_classes, decay, difficulty: see `lff`.
      labels_all: [N], the labels of the training set.
      biased_loss: `biased_loss(logits, labels) -> [B]`, the loss of the biased network.
      synthesize: `synthesize(key, batch)`, what the biased network learns from; the batch itself if None.
        The losses that it remembers, and with them the relative difficulties, are always those of the
        batch, in training mode; the batch statistics that it keeps are of what it learns from.

    Raises:
      UserError: `decay` out of range, or batches without `index`.
    """
    check_decay(decay)

    def init(key: chex.PRNGKey, batch: Batch) -> LffState:
        check_index(batch)
        debiased_key, biased_key = jax.random.split(key)

        def start(key: chex.PRNGKey) -> tuple[Variables, optax.OptState, LossMemory]:
            variables = network.init(key, batch["image"])
            return variables, optimizer.init(variables["params"]), init_loss_memory(len(labels_all))

        return LffState(*start(debiased_key), *start(biased_key))

    def update(state: LffState, batch: Batch, key: chex.PRNGKey) -> tuple[LffState, dict[str, jax.Array]]:
        labels, index = batch["label"], batch["index"]
        debiased_key, biased_key, synthesis_key = jax.random.split(key, 3)
        learnt = None if synthesize is None else synthesize(synthesis_key, batch)

        def forward(
            variables: Variables, params: chex.ArrayTree, image: jax.Array, key: chex.PRNGKey
        ) -> tuple[jax.Array, Variables]:
            outputs, variables = network.apply({**variables, "params": params}, image, train=True, key=key)
            return outputs["logits"], variables

        def loss(params: chex.ArrayTree, biased_params: chex.ArrayTree) -> tuple[jax.Array, tuple]:
            logits_d, variables = forward(state.variables, params, batch["image"], debiased_key)
            logits_b, biased_variables = forward(
                state.biased_variables, biased_params, batch["image"], biased_key
            )
            ce_b, ce_d = negative_log_likelihood(logits_b, labels), negative_log_likelihood(logits_d, labels)
            mem_b = update_loss_memory(state.biased_memory, index, ce_b, decay)
            mem_d = update_loss_memory(state.memory, index, ce_d, decay)
            if difficulty == "memory":
                weight = relative_difficulty(mem_b, mem_d, index, labels, labels_all, num_classes)
            else:
                weight = _share(ce_b, ce_d, eps=1e-8)
            loss_b, loss_d, _ = lff_losses(logits_b, logits_d, labels, weight, biased_loss=biased_loss)
            if learnt is not None:
                learnt_logits, biased_variables = forward(
                    state.biased_variables, biased_params, learnt.image, biased_key
                )
                loss_b = masked_mean(biased_loss(learnt_logits, learnt.label), learnt.mask)
            metrics = {
                "loss": loss_b + loss_d,
                "biased_loss": loss_b,
                "debiased_loss": loss_d,
                "accuracy": jnp.mean(correct(logits_d, labels)),
                "biased_accuracy": jnp.mean(correct(logits_b, labels)),
                "weight": jnp.mean(weight),
            }
            return metrics["loss"], ((variables, mem_d), (biased_variables, mem_b), metrics)

        gradients, (debiased, biased, metrics) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
            state.variables["params"], state.biased_variables["params"]
        )
        (variables, mem_d), (biased_variables, mem_b) = debiased, biased
        return LffState(
            *apply_gradient(optimizer, gradients[0], variables, state.opt_state),
            mem_d,
            *apply_gradient(optimizer, gradients[1], biased_variables, state.biased_opt_state),
            mem_b,
        ), metrics

    def predict(state: LffState, batch: Batch) -> Outputs:
        return network.apply(state.variables, batch["image"], train=False)[0]

    return Method(init, update, predict)


def lff(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    dataset: Mapping[str, np.ndarray],
    num_classes: int,
    q: float = 0.7,
    decay: float = 0.7,
    biased_loss: BiasedLoss = "generalized_cross_entropy",
    difficulty: Difficulty = "memory",
) -> Method:
    """Trains a biased and a debiased classifier, Algorithm 1.

    A batch is {"image": [B, ...], "label": [B], "index": [B]}; `index` are the positions of its examples
    in `dataset`.

    Args:
      network: of both classifiers, which start from different keys and share nothing.
      optimizer: of both classifiers, each with a state of its own.
      dataset: the columns that the batches are drawn from; only `label` is used.
      num_classes: C.
      q: of the generalised cross entropy, in (0, 1].
      decay: weight of the old value in the averages of the losses, in [0, 1).
      biased_loss: of the biased network. "cross_entropy" is the ablation that does not amplify the bias.
      difficulty: whether W is taken of the averages ("memory"), or of the losses of the batch as they are
        ("batch"), as the paper has it.

    Metrics: `loss`, the sum of `biased_loss` and `debiased_loss`; `accuracy` of the debiased network and
    `biased_accuracy` on the training batch; `weight`, the mean relative difficulty.

    Raises:
      UserError: `q` or `decay` out of range, a label outside 0..C - 1, or batches without `index`.
    """
    return learn_from_failure(
        network,
        optimizer,
        labels_all=training_labels(dataset, num_classes),
        num_classes=num_classes,
        decay=decay,
        biased_loss=loss_of_biased(biased_loss, q),
        difficulty=difficulty,
    )


def check_decay(decay: float) -> None:
    """Refuses weights of the old value outside [0, 1)."""
    if not 0 <= decay < 1:
        raise UserError(f"decay: expected a number in [0, 1), got {decay}.")


def check_index(batch: Batch) -> None:
    """Refuses batches that do not say which examples they hold."""
    if "index" not in batch:
        raise UserError("the batches have no 'index'; take a stream over a data set.")


def training_labels(dataset: Mapping[str, np.ndarray], num_classes: int) -> np.ndarray:
    """The labels of a data set, int32 [N], or `UserError` where one is outside 0..C - 1."""
    labels = np.asarray(dataset["label"], np.int32)
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"num_classes: {num_classes}, but the labels of the data set are {labels.min()}..{labels.max()}."
        )
    return labels


def loss_of_biased(name: BiasedLoss, q: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The loss `(logits, labels) -> [B]` of a biased network, or `UserError` where `q` is out of (0, 1]."""
    if not 0 < q <= 1:
        raise UserError(f"q: expected a number in (0, 1], got {q}.")
    return {
        "generalized_cross_entropy": functools.partial(generalized_cross_entropy, q=q),
        "cross_entropy": negative_log_likelihood,
    }[name]
