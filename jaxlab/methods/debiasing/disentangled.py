"""Disentangled feature augmentation (LDD, DisEnt): swaps the bias features of examples between each other.

Jungsoo Lee, Eungyeup Kim, Juyoung Lee, Jihyeon Lee, Jaegul Choo. *Learning Debiased Representation via
Disentangled Feature Augmentation*. NeurIPS 2021 (arXiv 2107.01372). Official code:
kakaoenterprise/Learning-Debiased-Disentangled.

Two encoders, E_l ("label", intrinsic) and E_b (bias), are told apart by the losses of learning from
failure (`lff.py`): E_b learns what is easy, E_l what E_b fails on. Two linear heads, C_l and C_b, see the
features of both, but each trains its own encoder only. Once the encoders have parted, the features z_l of
one example with the z_b of another are new bias-conflicting ones, in any number.

Where the paper and its code differ, this follows the code, which the reported numbers come from:

- W is taken of moving averages of the losses divided by their class's maximum, as in `lff.py`.
- The first step that swaps is the one after `swap_start`, while the decay of the learning rate counts from
  `swap_start` itself (`delayed_step_decay`).
- W belongs to the example that gives z_l, and is not permuted with z_b; the swapped label is C_b's target.

As no gradient crosses, E_b and C_b only ever see lambda_dis_align * dis_align + lambda_swap *
lambda_swap_align * swap_align: under Adam their scale cancels and only ratios act.
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
from jaxlab.methods.debiasing.lff import (
    LossMemory,
    check_decay,
    check_index,
    generalized_cross_entropy,
    init_loss_memory,
    loss_of_biased,
    relative_difficulty,
    training_labels,
    update_loss_memory,
)
from jaxlab.metrics.classification import correct, negative_log_likelihood
from jaxlab.metrics.reductions import masked_mean

Head = Callable[[jax.Array], jax.Array]  # features [B, 2F], the intrinsic ones first -> logits [B, C]
Loss = Callable[[jax.Array, jax.Array], jax.Array]  # logits [B, C], labels [B] -> [B]


def disentangled_logits(
    head_l: Head, head_b: Head, z_l: jax.Array, z_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits of both heads, C_l(z_l ‖ sg(z_b)) and C_b(sg(z_l) ‖ z_b); [B, F], [B, F] -> [B, C], [B, C].

    A head has weights on the features of both encoders and trains all of them, but passes a gradient to
    its own encoder only.
    """
    chex.assert_equal_shape([z_l, z_b])
    stop = jax.lax.stop_gradient
    return head_l(jnp.concatenate([z_l, stop(z_b)], -1)), head_b(jnp.concatenate([stop(z_l), z_b], -1))


def swap_bias_features(z_b: jax.Array, labels: jax.Array, perm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bias features and the labels of each example's partner; [B, F], [B], permutation [B].

    Any permutation will do: one that leaves an example its own features, or gives it those of another
    example of its class, is not excluded.
    """
    chex.assert_equal_shape([labels, perm])
    return z_b[perm], labels[perm]


def disentangle_losses(
    head_l: Head,
    head_b: Head,
    z_l: jax.Array,
    z_b: jax.Array,
    labels: jax.Array,
    weight: jax.Array,
    perm: jax.Array,
    q: float = 0.7,
    *,
    biased_loss: Loss | None = None,
) -> dict[str, jax.Array]:
    """What L_dis and L_swap are made of: the four losses of each example, without their factors.

    Args:
      head_l: C_l.
      head_b: C_b.
      z_l: [B, F], features of the intrinsic encoder.
      z_b: [B, F], features of the bias encoder.
      labels: [B] integers.
      weight: [B], the relative difficulty W; taken as a constant.
      perm: [B], whose bias features each example is given.
      q: of the generalised cross entropy.
      biased_loss: `biased_loss(logits, labels) -> [B]`, in place of the generalised cross entropy.

    Returns:
      [B] each, by row of z_l: `dis_conflict`, W times the cross entropy of C_l; `dis_align`, the biased loss
      of C_b; and, where z_b is the partner's, `swap_conflict`, W times the cross entropy of C_l with the
      example's label, and `swap_align`, the biased loss of C_b with the partner's label.
    """
    chex.assert_equal_shape([labels, weight])
    biased_loss = biased_loss or functools.partial(generalized_cross_entropy, q=q)
    weight = jax.lax.stop_gradient(weight)
    logits_l, logits_b = disentangled_logits(head_l, head_b, z_l, z_b)
    z_b_swapped, labels_swapped = swap_bias_features(z_b, labels, perm)
    swapped_l, swapped_b = disentangled_logits(head_l, head_b, z_l, z_b_swapped)
    return {
        "dis_conflict": weight * negative_log_likelihood(logits_l, labels),
        "dis_align": biased_loss(logits_b, labels),
        "swap_conflict": weight * negative_log_likelihood(swapped_l, labels),
        "swap_align": biased_loss(swapped_b, labels_swapped),
    }


def recombined_loss(
    head_b: Head, z_l: jax.Array, z_b: jax.Array, labels: jax.Array, perm: jax.Array
) -> jax.Array:
    """Cross entropy [B] of C_b(sg(z_l[perm]) ‖ z_b) with the labels of z_b, in nats. Not in the paper.

    The intrinsic features are those of a random example, so that only z_b tells the label.
    """
    chex.assert_equal_shape([z_l, z_b])
    features = jnp.concatenate([jax.lax.stop_gradient(z_l)[perm], z_b], -1)
    return negative_log_likelihood(head_b(features), labels)


def combine_losses(
    losses: Mapping[str, jax.Array],
    lambda_dis_align: float,
    lambda_swap_align: float,
    lambda_swap: float,
    swap_on: bool | jax.Array,
    mask: Mapping[str, jax.Array] | None = None,
) -> jax.Array:
    """The loss of the batch, L_dis + lambda_swap L_swap, each its conflict + lambda_align align term.

    Args:
      losses: of `disentangle_losses`.
      lambda_dis_align: factor of `dis_align`.
      lambda_swap_align: factor of `swap_align`.
      lambda_swap: factor of both swapped losses.
      swap_on: whether they count at all; may be traced.
      mask: [B] bool, the rows that a loss is the mean of, by its name; all rows where there is none. A
        mean over no rows is 0.

    Returns:
      A scalar.
    """
    mean = _means(losses, mask)
    dis = mean["dis_conflict"] + lambda_dis_align * mean["dis_align"]
    swap = mean["swap_conflict"] + lambda_swap_align * mean["swap_align"]
    return dis + swap_on * lambda_swap * swap


def _means(losses: Mapping[str, jax.Array], mask: Mapping[str, jax.Array] | None) -> dict[str, jax.Array]:
    return {name: masked_mean(values, (mask or {}).get(name)) for name, values in losses.items()}


def swap_schedule(step: int | jax.Array, start: int) -> bool | jax.Array:
    """Whether the step (from 0) trains on swapped features too: those after `start`, not `start` itself."""
    return step > start


def delayed_step_decay(base_lr: float, start: int, interval: int, gamma: float) -> optax.Schedule:
    """`base_lr` times `gamma` to the number of whole intervals since step `start`; `base_lr` before.

    `optax.exponential_decay(staircase=True)` divides in floating point, and a step that ends an interval
    may be counted as before its end where that is not exactly rounded.
    """
    if interval < 1:
        raise UserError(f"delayed_step_decay: interval: expected 1 or more, got {interval}.")
    return lambda step: base_lr * gamma ** (jnp.maximum(step - start, 0) // interval)


class DisentangledState(NamedTuple):
    """Variables of both branches; optimizer state and loss memory of the intrinsic and of the bias one.

    Attributes:
      variables: {"intrinsic": ..., "bias": ...}, each with "params": {"encoder": ..., "head": {"kernel"
        [2F, C], "bias" [C]}} and what else the encoder keeps, as "batch_stats".
      opt_state: of the intrinsic encoder and head.
      memory: of the intrinsic head's losses.
      biased_opt_state: of the bias encoder and head.
      biased_memory: of the bias head's losses.
      step: int32, the number of updates made.
    """

    variables: dict[str, Variables]
    opt_state: optax.OptState
    memory: LossMemory
    biased_opt_state: optax.OptState
    biased_memory: LossMemory
    step: jax.Array


def _init_head(key: chex.PRNGKey, features: int, num_classes: int) -> dict[str, jax.Array]:
    """A linear layer's parameters, started as PyTorch does."""
    uniform = functools.partial(jax.random.uniform, minval=-(features**-0.5), maxval=features**-0.5)
    kernel_key, bias_key = jax.random.split(key)
    return {"kernel": uniform(kernel_key, (features, num_classes)), "bias": uniform(bias_key, (num_classes,))}


def _linear(params: Mapping[str, jax.Array], features: jax.Array) -> jax.Array:
    return features @ params["kernel"] + params["bias"]


def _encode(
    network: Network, variables: Variables, images: jax.Array, *, train: bool, key: chex.PRNGKey | None = None
) -> tuple[jax.Array, Variables]:
    """Features [B, F] of one branch, and its variables with updated batch statistics."""
    encoder = {**variables, "params": variables["params"]["encoder"]}
    outputs, encoder = network.apply(encoder, images, train=train, key=key)
    return outputs["features"], {**encoder, "params": variables["params"]}


def disentangled_update(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    labels_all: np.ndarray,
    num_classes: int,
    decay: float,
    swap_start: int,
    lambda_dis_align: float,
    lambda_swap_align: float,
    lambda_swap: float,
    biased_loss: Loss,
    recombine: bool = False,
) -> Callable[..., tuple[DisentangledState, dict[str, jax.Array]]]:
    """The step of `disentangled`: `update(state, batch, key, selected=None) -> (state, metrics)`.

    `selected` [B] bool restricts the biased losses to these examples of the batch; the swapped one goes
    with the bias features. The permutation is drawn over the whole batch, however devices share it.

    Args:
      network: of both encoders.
      optimizer: of both branches, each with a state of its own.
      labels_all: [N] integers, the labels of the training set.
      num_classes: C.
      decay: of `update_loss_memory`.
      swap_start: of `swap_schedule`.
      lambda_dis_align, lambda_swap_align, lambda_swap: of `combine_losses`.
      biased_loss: `biased_loss(logits, labels) -> [B]`, of the bias head.
      recombine: whether `recombined_loss` takes the place of `dis_align`.
    """

    def update(
        state: DisentangledState, batch: Batch, key: chex.PRNGKey, selected: jax.Array | None = None
    ) -> tuple[DisentangledState, dict[str, jax.Array]]:
        labels, index = batch["label"], batch["index"]
        intrinsic_key, bias_key, perm_key = jax.random.split(key, 3)
        perm = jax.random.permutation(perm_key, len(labels))
        swap_on = swap_schedule(state.step, swap_start)
        mask = {} if selected is None else {"dis_align": selected, "swap_align": selected[perm]}

        def forward(
            name: str, params: chex.ArrayTree, key: chex.PRNGKey
        ) -> tuple[jax.Array, Variables, Head]:
            variables = {**state.variables[name], "params": params}
            z, variables = _encode(network, variables, batch["image"], train=True, key=key)
            return z, variables, functools.partial(_linear, params["head"])

        def remember(memory: LossMemory, logits: jax.Array) -> LossMemory:
            return update_loss_memory(memory, index, negative_log_likelihood(logits, labels), decay)

        def loss(params: chex.ArrayTree, biased_params: chex.ArrayTree) -> tuple[jax.Array, tuple]:
            z_l, variables, head_l = forward("intrinsic", params, intrinsic_key)
            z_b, biased_variables, head_b = forward("bias", biased_params, bias_key)
            # The losses compute these logits again; the compiler makes them one.
            logits_l, logits_b = disentangled_logits(head_l, head_b, z_l, z_b)
            memory, biased_memory = remember(state.memory, logits_l), remember(state.biased_memory, logits_b)
            weight = relative_difficulty(biased_memory, memory, index, labels, labels_all, num_classes)
            losses = disentangle_losses(
                head_l, head_b, z_l, z_b, labels, weight, perm, biased_loss=biased_loss
            )
            if recombine:
                losses["dis_align"] = recombined_loss(head_b, z_l, z_b, labels, perm)
            value = combine_losses(losses, lambda_dis_align, lambda_swap_align, lambda_swap, swap_on, mask)
            metrics = {
                "loss": value,
                **_means(losses, mask),
                "accuracy": jnp.mean(correct(logits_l, labels)),
                "biased_accuracy": jnp.mean(correct(logits_b, labels)),
                "weight": jnp.mean(weight),
            }
            return value, ((variables, memory), (biased_variables, biased_memory), metrics)

        gradients, (intrinsic, bias, metrics) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
            state.variables["intrinsic"]["params"], state.variables["bias"]["params"]
        )
        (variables, memory), (biased_variables, biased_memory) = intrinsic, bias
        variables, opt_state = apply_gradient(optimizer, gradients[0], variables, state.opt_state)
        biased_variables, biased_opt_state = apply_gradient(
            optimizer, gradients[1], biased_variables, state.biased_opt_state
        )
        return DisentangledState(
            {"intrinsic": variables, "bias": biased_variables},
            opt_state,
            memory,
            biased_opt_state,
            biased_memory,
            state.step + 1,
        ), metrics

    return update


def disentangled(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    dataset: Mapping[str, np.ndarray],
    num_classes: int,
    q: float = 0.7,
    decay: float = 0.7,
    swap_start: int,
    lambda_dis_align: float,
    lambda_swap_align: float,
    lambda_swap: float = 1.0,
    recombine: bool = False,
    head: Literal["intrinsic", "bias"] = "intrinsic",
) -> Method:
    """Trains an intrinsic and a bias encoder, each with a linear head on the features of both.

    A batch is {"image": [B, ...], "label": [B], "index": [B]}; `index` are the positions of its examples
    in `dataset`. Prediction pairs an example's intrinsic features with its own bias features; the outputs
    are `logits` [B, C] and `features` [B, 2F].

    Args:
      network: of both encoders, which start from different keys and share nothing; only its "features"
        [B, F] are used.
      optimizer: of both branches, each with a state of its own.
      dataset: the columns that the batches are drawn from; only `label` is used.
      num_classes: C.
      q: of the generalised cross entropy, in (0, 1].
      decay: weight of the old value in the averages of the losses, in [0, 1).
      swap_start: the last step, counted from 0, that trains on no swapped features.
      lambda_dis_align: factor of the bias head's loss.
      lambda_swap_align: factor of the bias head's loss on swapped features, beside `lambda_swap`.
      lambda_swap: factor of both heads' losses on swapped features.
      recombine: whether the bias head learns, by cross entropy, from its own features beside another
        example's intrinsic ones (`recombined_loss`) in place of that loss on an example's own two.
      head: which one predicts.

    Metrics: `loss`; the means of what it is made of, `dis_conflict`, `dis_align`, `swap_conflict` and
    `swap_align`, the latter two also before they count; `accuracy` of the intrinsic and `biased_accuracy`
    of the bias head on the training batch; `weight`, the mean relative difficulty.

    Raises:
      UserError: `q` or `decay` out of range, a label outside 0..C - 1, or batches without `index`.
    """
    check_decay(decay)
    labels_all = training_labels(dataset, num_classes)

    def init(key: chex.PRNGKey, batch: Batch) -> DisentangledState:
        check_index(batch)

        def start(key: chex.PRNGKey) -> Variables:
            encoder_key, head_key = jax.random.split(key)
            encoder = network.init(encoder_key, batch["image"])
            outputs, _ = jax.eval_shape(
                functools.partial(network.apply, train=False), encoder, batch["image"]
            )
            head = _init_head(head_key, 2 * outputs["features"].shape[-1], num_classes)
            return {**encoder, "params": {"encoder": encoder["params"], "head": head}}

        intrinsic_key, bias_key = jax.random.split(key)
        variables = {"intrinsic": start(intrinsic_key), "bias": start(bias_key)}
        return DisentangledState(
            variables,
            optimizer.init(variables["intrinsic"]["params"]),
            init_loss_memory(len(labels_all)),
            optimizer.init(variables["bias"]["params"]),
            init_loss_memory(len(labels_all)),
            jnp.zeros((), jnp.int32),
        )

    update = disentangled_update(
        network,
        optimizer,
        labels_all=labels_all,
        num_classes=num_classes,
        decay=decay,
        swap_start=swap_start,
        lambda_dis_align=lambda_dis_align,
        lambda_swap_align=lambda_swap_align,
        lambda_swap=lambda_swap,
        biased_loss=loss_of_biased("generalized_cross_entropy", q),
        recombine=recombine,
    )

    def predict(state: DisentangledState, batch: Batch) -> Outputs:
        branches = state.variables["intrinsic"], state.variables["bias"]
        z = [_encode(network, variables, batch["image"], train=False)[0] for variables in branches]
        features = jnp.concatenate(z, -1)
        return {"logits": _linear(state.variables[head]["params"]["head"], features), "features": features}

    return Method(init, update, predict)
