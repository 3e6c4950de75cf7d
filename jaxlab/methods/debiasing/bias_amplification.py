"""Amplifying the bias in the data of the biased network, in place of in its loss.

Learning from failure (`lff`) makes its biased network more biased through the loss, the generalised cross
entropy. Here it is trained on data that are more biased than the training set, with the plain cross entropy;
the debiased network learns from the training set, by relative difficulty, as in `lff`. What makes the data:

- a *bias definition*, a transform that sets the attribute of an image, e.g. its colour (`aligned_copy`,
  `bias_only`). No paper has this exact proposal. It needs less than an attribute label of each example, and
  more than that the bias is easy. Diffusing DeBias (Ciranni et al., arXiv 2502.09564) learns a synthesiser.
- an ensemble of early-stopped biased networks, which tells the examples that look biased: the others are
  left out. Jungsoo Lee, Jeonghoon Park, Daeyoung Kim, Juyoung Lee, Edward Choi, Jaegul Choo. *Revisiting the
  Importance of Amplifying Bias for Debiasing*. AAAI 2023. Official code: kakaoenterprise/BiasEnsemble.
- recombined features: `disentangled` with `recombine`.

With `p=0` and the generalised cross entropy, `amplified_lff` is `lff` to the bit.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.core import Batch, Method, Network, Outputs, TrainedNetwork, UserError, Variables
from jaxlab.core.updates import gradient_update, minimize
from jaxlab.data import transforms as data_transforms
from jaxlab.data.coloring import MEAN_COLOR, colorize
from jaxlab.data.transforms import Transform
from jaxlab.methods.debiasing.disentangled import DisentangledState, disentangled, disentangled_update
from jaxlab.methods.debiasing.lff import (
    BiasedBatch,
    BiasedLoss,
    LffState,
    LossMemory,
    check_decay,
    check_index,
    init_loss_memory,
    learn_from_failure,
    loss_of_biased,
    relative_difficulty,
    training_labels,
    update_loss_memory,
)
from jaxlab.metrics.classification import correct, negative_log_likelihood
from jaxlab.metrics.outputs import map_rows
from jaxlab.metrics.reductions import masked_mean


class BiasDefinition(NamedTuple):
    """What the bias is.

    Attributes:
      num_attrs: A.
      apply: `apply(key, x, attr) -> x` sets the attributes [B] of the examples x and keeps the rest; x is an
        array, or a tree of arrays (a batch), with leading axis [B]. It draws the attribute's own noise anew.
      aligned_attr: [C] integers, the attribute that goes with each class.
      infer: optional; `infer(x) -> [B, A]`, scores of the attributes, see `estimate_aligned_attr`.
    """

    num_attrs: int
    apply: Callable[[chex.PRNGKey, chex.ArrayTree, jax.Array], chex.ArrayTree]
    aligned_attr: chex.Array
    infer: Callable[[chex.ArrayTree], jax.Array] | None = None


# `(key, x, y [B], definition, p) -> (x, y [B], mask [B] bool)`: what a biased network learns from.
BiasSynthesizer = Callable[
    [chex.PRNGKey, chex.ArrayTree, jax.Array, BiasDefinition, float],
    tuple[chex.ArrayTree, jax.Array, jax.Array],
]


def none(
    key: chex.PRNGKey, x: chex.ArrayTree, y: jax.Array, definition: BiasDefinition, p: float
) -> tuple[chex.ArrayTree, jax.Array, jax.Array]:
    """The examples as they are."""
    del key, definition, p
    return x, y, jnp.ones(len(y), bool)


def aligned_copy(
    key: chex.PRNGKey, x: chex.ArrayTree, y: jax.Array, definition: BiasDefinition, p: float
) -> tuple[chex.ArrayTree, jax.Array, jax.Array]:
    """Examples, each with probability `p`, get that of their class; the content still tells the label."""
    choice_key, apply_key = jax.random.split(key)
    synthetic = jax.random.uniform(choice_key, y.shape) < p
    made = definition.apply(apply_key, x, jnp.asarray(definition.aligned_attr)[y])
    return _where(synthetic, made, x), y, jnp.ones(len(y), bool)


def bias_only(
    key: chex.PRNGKey, x: chex.ArrayTree, y: jax.Array, definition: BiasDefinition, p: float
) -> tuple[chex.ArrayTree, jax.Array, jax.Array]:
    """Each example, with probability `p`, gets a label drawn uniformly and the attribute of that label.

    With `p` = 1 the content is independent of the label, and the attribute alone tells it.
    """
    choice_key, label_key, apply_key = jax.random.split(key, 3)
    synthetic = jax.random.uniform(choice_key, y.shape) < p
    aligned_attr = jnp.asarray(definition.aligned_attr)
    drawn = jax.random.randint(label_key, y.shape, 0, len(aligned_attr), y.dtype)
    made = definition.apply(apply_key, x, aligned_attr[drawn])
    return _where(synthetic, made, x), jnp.where(synthetic, drawn, y), jnp.ones(len(y), bool)


def select(
    key: chex.PRNGKey, x: chex.ArrayTree, y: jax.Array, definition: BiasDefinition | None, p: float
) -> tuple[chex.ArrayTree, jax.Array, jax.Array]:
    """The examples as they are, of which those are learnt from that `x["selected"]`, [B] bool, says."""
    del key, definition, p
    return x, y, x["selected"]


def select_aligned(
    key: chex.PRNGKey, x: chex.ArrayTree, y: jax.Array, definition: BiasDefinition, p: float
) -> tuple[chex.ArrayTree, jax.Array, jax.Array]:
    """The oracle's selection: the examples whose `x["attribute"]` is that of their class."""
    del key, p
    return x, y, x["attribute"] == jnp.asarray(definition.aligned_attr)[y]


def _where(condition: jax.Array, made: chex.ArrayTree, real: chex.ArrayTree) -> chex.ArrayTree:
    def pick(made: jax.Array, real: jax.Array) -> jax.Array:
        return jnp.where(condition.reshape(-1, *[1] * (real.ndim - 1)), made, real)

    return jax.tree.map(pick, made, real)


_SYNTHESIZERS = {function.__name__: function for function in (none, aligned_copy, bias_only, select_aligned)}


def estimate_aligned_attr(infer_scores: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """The attribute with the largest sum of scores among the examples of each class; [N, A], [N] -> [C]."""
    chex.assert_equal_shape_prefix([infer_scores, labels], 1)
    return jnp.argmax(jax.ops.segment_sum(infer_scores, labels, num_classes), axis=-1)


def amplified_share(beta: float, p: float) -> float:
    """The expected share of aligned examples, where it was `beta` and each became so with probability `p`."""
    return 1 - (1 - p) * (1 - beta)


def select_by_agreement(true_class_prob: jax.Array, threshold: float = 0.99, agreement: int = 3) -> jax.Array:
    """Examples that at least `agreement` of M networks give more than `threshold`; [M, N] -> [N] bool."""
    return jnp.sum(true_class_prob > threshold, axis=0) >= agreement


def recoloring(
    *,
    std: float,
    aligned_attr: tuple[int, ...] = tuple(range(10)),
    transforms: tuple[Transform, ...] = (),
) -> BiasDefinition:
    """The bias of coloured digits: a new colour for the grey image.

    The examples are batches with the grey images as `gray`, uint8 [B, H, W] (`colored_digits` with
    `keep_gray`); `image` is made anew.

    Args:
      std: of the colours, see `jaxlab.data.coloring.colorize`.
      aligned_attr: the colour that goes with each class.
      transforms: those of the training stream.
    """
    if not all(0 <= a < len(MEAN_COLOR) for a in aligned_attr):
        raise UserError(f"aligned_attr: expected colours 0..{len(MEAN_COLOR) - 1}, got {aligned_attr}.")

    def apply(key: chex.PRNGKey, batch: Batch, attr: jax.Array) -> Batch:
        if "gray" not in batch:
            raise UserError(
                "recoloring: the batches have no 'gray'; set keep_gray=True where digits are coloured."
            )
        noise_key, transform_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (len(attr), 3))
        image = colorize(batch["gray"], attr, noise, std, jnp.asarray(MEAN_COLOR))
        return data_transforms.apply({**batch, "image": image}, transform_key, transforms)

    return BiasDefinition(len(MEAN_COLOR), apply, np.asarray(aligned_attr, np.int32))


def variant_lookup(
    *,
    aligned_attr: tuple[int, ...] = tuple(range(10)),
    num_attrs: int = 10,
    transforms: tuple[Transform, ...] = (),
) -> BiasDefinition:
    """A bias whose every value was applied to each clean image beforehand, such as a corruption.

    The examples are batches with these images as `variants`, [B, A, H, W, C] (`corrupted_images` with
    `keep_variants`); `image` is made anew. The attribute's own noise is that of the variant.

    Args:
      aligned_attr: the attribute that goes with each class.
      num_attrs: A.
      transforms: those of the training stream.
    """
    if not all(0 <= a < num_attrs for a in aligned_attr):
        raise UserError(f"aligned_attr: expected attributes 0..{num_attrs - 1}, got {aligned_attr}.")

    def apply(key: chex.PRNGKey, batch: Batch, attr: jax.Array) -> Batch:
        if "variants" not in batch or batch["variants"].shape[1] != num_attrs:
            raise UserError(
                f"variant_lookup: the batches have no 'variants' of {num_attrs} attributes; set"
                " keep_variants=True where images are corrupted."
            )
        image = jnp.take_along_axis(batch["variants"], attr[:, None, None, None, None], axis=1)[:, 0]
        return data_transforms.apply({**batch, "image": image}, key, transforms)

    return BiasDefinition(num_attrs, apply, np.asarray(aligned_attr, np.int32))


def _synthesize(
    synthesizer: str | BiasSynthesizer,
    definition: BiasDefinition,
    p: float,
    num_classes: int,
    placement: Literal["replace", "append"],
) -> Callable[[chex.PRNGKey, Batch], BiasedBatch]:
    if not 0 <= p <= 1:
        raise UserError(f"p: expected a number in [0, 1], got {p}.")
    if len(definition.aligned_attr) != num_classes:
        raise UserError(
            f"definition.aligned_attr: expected an attribute for each of {num_classes} classes, got"
            f" {len(definition.aligned_attr)}."
        )
    if isinstance(synthesizer, str) and synthesizer not in _SYNTHESIZERS:
        raise UserError(f"synthesizer: no '{synthesizer}'. It may be: {', '.join(_SYNTHESIZERS)}.")
    function = _SYNTHESIZERS[synthesizer] if isinstance(synthesizer, str) else synthesizer

    def synthesize(key: chex.PRNGKey, batch: Batch) -> BiasedBatch:
        learnt = _learnt(function, key, batch, definition, p)
        if placement == "replace":
            return learnt
        real = BiasedBatch(batch["image"], batch["label"], jnp.ones_like(learnt.mask))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), real, learnt)

    return synthesize


def _learnt(
    synthesizer: BiasSynthesizer,
    key: chex.PRNGKey,
    batch: Batch,
    definition: BiasDefinition | None = None,
    p: float = 1.0,
) -> BiasedBatch:
    made, labels, mask = synthesizer(key, batch, batch["label"], definition, p)
    return BiasedBatch(made["image"], labels, mask)


def amplified_lff(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    dataset: Mapping[str, np.ndarray],
    num_classes: int,
    definition: BiasDefinition,
    synthesizer: str | Callable = "bias_only",
    p: float = 1.0,
    placement: Literal["replace", "append"] = "replace",
    biased_loss: BiasedLoss = "cross_entropy",
    q: float = 0.7,
    decay: float = 0.7,
) -> Method:
    """Learning from failure whose biased network learns from synthesised, more biased examples.

    Both networks train together. State, metrics and all that is not said here are as in `lff`.

    Args:
      network, optimizer, dataset, num_classes, q, decay: see `lff`.
      definition: what the bias is. Batches carry what its `apply` needs.
      synthesizer: "none", "aligned_copy", "bias_only", "select_aligned", or a `BiasSynthesizer`.
      p: its strength, the probability of an example to be synthesised.
      placement: whether the synthesised batch stands in place of the real one, or is appended to it.
      biased_loss: of the biased network.

    Raises:
      UserError: an argument is out of range, or the definition is of other classes.
    """
    return learn_from_failure(
        network,
        optimizer,
        labels_all=training_labels(dataset, num_classes),
        num_classes=num_classes,
        decay=decay,
        biased_loss=loss_of_biased(biased_loss, q),
        synthesize=_synthesize(synthesizer, definition, p, num_classes, placement),
    )


def amplified_erm(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    num_classes: int,
    definition: BiasDefinition,
    synthesizer: str | Callable = "bias_only",
    p: float = 1.0,
    placement: Literal["replace", "append"] = "replace",
    biased_loss: BiasedLoss = "cross_entropy",
    q: float = 0.7,
) -> Method:
    """Trains the biased network alone, for `two_stage_lff` to start from; arguments as of `amplified_lff`.

    Metrics: `loss`, and `accuracy` on what it learns from.
    """
    synthesize = _synthesize(synthesizer, definition, p, num_classes, placement)
    per_example = loss_of_biased(biased_loss, q)

    def loss(
        variables: Variables, batch: Batch, key: chex.PRNGKey
    ) -> tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]:
        network_key, synthesis_key = jax.random.split(key)
        learnt = synthesize(synthesis_key, batch)
        outputs, variables = network.apply(variables, learnt.image, train=True, key=network_key)
        logits = outputs["logits"]
        value = masked_mean(per_example(logits, learnt.label), learnt.mask)
        return value, (variables, {"accuracy": masked_mean(correct(logits, learnt.label), learnt.mask)})

    return minimize(network, optimizer, loss)


def two_stage_lff(
    network: Network,
    biased_network: TrainedNetwork,
    optimizer: optax.GradientTransformation,
    *,
    dataset: Mapping[str, np.ndarray],
    num_classes: int,
    decay: float = 0.7,
    batch_size: int = 512,
    transforms: tuple[Transform, ...] = (),
) -> Method:
    """Trains the debiased network alone, by relative difficulty to a biased one that is trained and frozen.

    The biased network's losses are those of its predictions on the whole training set, once, in `init`.

    Args:
      network, optimizer, num_classes, decay: see `lff`.
      biased_network: whose `init` returns its trained variables: in a config,
        `init_from=dict(biased_network="<stage>")`.
      dataset: the columns that the batches are drawn from; `image` and `label` are used.
      batch_size: rows per forward pass of the biased network.
      transforms: the deterministic transforms of evaluation, from rows of `dataset` to network inputs.

    Metrics: `loss`, `accuracy` on the training batch, and `weight`, the mean relative difficulty.
    """
    check_decay(decay)
    labels_all = training_labels(dataset, num_classes)

    def init(key: chex.PRNGKey, batch: Batch) -> LffState:
        check_index(batch)
        network_key, biased_key = jax.random.split(key)
        variables = network.init(network_key, batch["image"])
        biased_variables = biased_network.init(biased_key, batch["image"])
        if jax.tree.map(jnp.shape, variables) != jax.tree.map(jnp.shape, biased_variables):
            raise UserError("biased_network: it must be of the kind and size of the network.")

        def losses(batch: Batch) -> jax.Array:
            outputs, _ = biased_network.apply(biased_variables, batch["image"], train=False)
            return negative_log_likelihood(outputs["logits"], batch["label"])

        fixed = map_rows(losses, _examples(dataset), batch_size=batch_size, transforms=transforms)
        return LffState(
            variables,
            optimizer.init(variables["params"]),
            init_loss_memory(len(labels_all)),
            biased_variables,
            (),
            LossMemory(fixed, jnp.ones(len(labels_all), bool)),
        )

    def update(state: LffState, batch: Batch, key: chex.PRNGKey) -> tuple[LffState, dict[str, jax.Array]]:
        labels, index = batch["label"], batch["index"]

        def loss(variables: Variables) -> tuple[jax.Array, tuple[Variables, dict[str, Any]]]:
            outputs, variables = network.apply(variables, batch["image"], train=True, key=key)
            losses = negative_log_likelihood(outputs["logits"], labels)
            memory = update_loss_memory(state.memory, index, losses, decay)
            weight = relative_difficulty(state.biased_memory, memory, index, labels, labels_all, num_classes)
            metrics = {
                "accuracy": jnp.mean(correct(outputs["logits"], labels)),
                "weight": jnp.mean(weight),
            }
            return jnp.mean(weight * losses), (variables, {"memory": memory, **metrics})

        variables, opt_state, metrics = gradient_update(loss, optimizer, state.variables, state.opt_state)
        memory = metrics.pop("memory")
        return state._replace(variables=variables, opt_state=opt_state, memory=memory), metrics

    def predict(state: LffState, batch: Batch) -> Outputs:
        return network.apply(state.variables, batch["image"], train=False)[0]

    return Method(init, update, predict)


# --- BiasEnsemble ---


def biased_ensemble(network: Network, optimizer: optax.GradientTransformation, *, q: float = 0.7) -> Method:
    """Trains an ensemble of biased networks, each with the mean generalised cross entropy.

    The official code trains five for 1000 steps and keeps the better of steps 0 and 500 on a validation set
    with the bias: train for 500 steps. Its members see batches of their own, these see the same ones.

    Args:
      network: of all members, `jaxlab.nn.ensemble.ensemble`.
      optimizer: elementwise, so that the members stay independent.
      q: of the generalised cross entropy, in (0, 1].

    Metrics: `loss`, the sum over members, and `accuracy` of the ensemble on the training batch.
    """
    per_example = loss_of_biased("generalized_cross_entropy", q)

    def loss(
        variables: Variables, batch: Batch, key: chex.PRNGKey
    ) -> tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]:
        outputs, variables = network.apply(variables, batch["image"], train=True, key=key)
        losses = jax.vmap(per_example, (1, None))(outputs["member_logits"], batch["label"])
        accuracy = jnp.mean(correct(outputs["logits"], batch["label"]))
        return losses.mean(1).sum(), (variables, {"accuracy": accuracy})

    return minimize(network, optimizer, loss)


class SelectionState(NamedTuple):
    """`LffState` and which training examples the biased network learns from, [N] bool."""

    variables: Variables
    opt_state: optax.OptState
    memory: LossMemory
    biased_variables: Variables
    biased_opt_state: optax.OptState
    biased_memory: LossMemory
    selected: jax.Array


def bias_ensemble(
    network: Network,
    ensemble_network: TrainedNetwork,
    optimizer: optax.GradientTransformation,
    *,
    dataset: Mapping[str, np.ndarray],
    num_classes: int,
    threshold: float = 0.99,
    agreement: int = 3,
    decay: float = 0.7,
    batch_size: int = 512,
    transforms: tuple[Transform, ...] = (),
) -> Method:
    """Learning from failure whose biased network learns, by cross entropy, only from what looks biased.

    That is what enough members of an ensemble trained by `biased_ensemble` are sure of.

    Args:
      network, optimizer, num_classes, decay: see `lff`.
      ensemble_network: whose `init` returns the trained ensemble's variables: in a config,
        `init_from=dict(ensemble_network="<stage>")`.
      dataset: the columns that the batches are drawn from; `image` and `label` are used.
      threshold, agreement: see `select_by_agreement`.
      batch_size: rows per forward pass of the ensemble.
      transforms: the deterministic transforms of evaluation, from rows of `dataset` to network inputs.

    Metrics: those of `lff`, and `selected`, the share of the training batch.
    """
    inner = learn_from_failure(
        network,
        optimizer,
        labels_all=training_labels(dataset, num_classes),
        num_classes=num_classes,
        decay=decay,
        biased_loss=negative_log_likelihood,
        synthesize=lambda key, batch: _learnt(select, key, batch),
    )

    def init(key: chex.PRNGKey, batch: Batch) -> SelectionState:
        inner_key, ensemble_key = jax.random.split(key)
        variables = ensemble_network.init(ensemble_key, batch["image"])
        probabilities = _true_class_prob(ensemble_network, variables, dataset, batch_size, transforms)
        selected = _select(probabilities, threshold, agreement)
        return SelectionState(*inner.init(inner_key, batch), selected)

    def update(
        state: SelectionState, batch: Batch, key: chex.PRNGKey
    ) -> tuple[SelectionState, dict[str, jax.Array]]:
        selected = state.selected[batch["index"]]
        updated, metrics = inner.update(LffState(*state[:-1]), {**batch, "selected": selected}, key)
        return SelectionState(*updated, state.selected), {**metrics, "selected": jnp.mean(selected)}

    return Method(init, update, inner.predict)


class DisentangledSelectionState(NamedTuple):
    """`DisentangledState` and which training examples the bias branch learns from, [N] bool."""

    variables: dict[str, Variables]
    opt_state: optax.OptState
    memory: LossMemory
    biased_opt_state: optax.OptState
    biased_memory: LossMemory
    step: jax.Array
    selected: jax.Array


def disentangled_bias_ensemble(
    network: Network,
    ensemble_network: TrainedNetwork,
    optimizer: optax.GradientTransformation,
    *,
    dataset: Mapping[str, np.ndarray],
    num_classes: int,
    swap_start: int,
    lambda_dis_align: float,
    lambda_swap_align: float,
    lambda_swap: float = 1.0,
    threshold: float = 0.99,
    agreement: int = 3,
    decay: float = 0.7,
    batch_size: int = 512,
    transforms: tuple[Transform, ...] = (),
) -> Method:
    """Disentangled feature augmentation whose bias branch learns, by cross entropy, from what looks biased.

    Args:
      network, optimizer, swap_start, lambda_dis_align, lambda_swap_align, lambda_swap: see `disentangled`.
      ensemble_network, dataset, num_classes, threshold, agreement, decay, batch_size, transforms: see
        `bias_ensemble`.

    Metrics: those of `disentangled`, and `selected`, the share of the training batch.
    """
    shared = dict(
        num_classes=num_classes,
        decay=decay,
        swap_start=swap_start,
        lambda_dis_align=lambda_dis_align,
        lambda_swap_align=lambda_swap_align,
        lambda_swap=lambda_swap,
    )
    inner = disentangled(network, optimizer, dataset=dataset, **shared)
    labels_all = training_labels(dataset, num_classes)
    inner_update = disentangled_update(
        network, optimizer, labels_all=labels_all, biased_loss=negative_log_likelihood, **shared
    )

    def init(key: chex.PRNGKey, batch: Batch) -> DisentangledSelectionState:
        inner_key, ensemble_key = jax.random.split(key)
        variables = ensemble_network.init(ensemble_key, batch["image"])
        probabilities = _true_class_prob(ensemble_network, variables, dataset, batch_size, transforms)
        selected = _select(probabilities, threshold, agreement)
        return DisentangledSelectionState(*inner.init(inner_key, batch), selected)

    def update(
        state: DisentangledSelectionState, batch: Batch, key: chex.PRNGKey
    ) -> tuple[DisentangledSelectionState, dict[str, jax.Array]]:
        selected = state.selected[batch["index"]]
        updated, metrics = inner_update(DisentangledState(*state[:-1]), batch, key, selected)
        metrics = {**metrics, "selected": jnp.mean(selected)}
        return DisentangledSelectionState(*updated, state.selected), metrics

    return Method(init, update, inner.predict)


def _examples(dataset: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: dataset[name] for name in ("image", "label")}


def _select(true_class_prob: jax.Array, threshold: float, agreement: int) -> jax.Array:
    if not 0 <= threshold < 1:
        raise UserError(f"threshold: expected a number in [0, 1), got {threshold}.")
    members = len(true_class_prob)
    if not 1 <= agreement <= members:
        raise UserError(f"agreement: expected 1 to {members}, the members of the ensemble, got {agreement}.")
    return select_by_agreement(true_class_prob, threshold, agreement)


def _true_class_prob(
    ensemble_network: Network,
    variables: Variables,
    dataset: Mapping[str, np.ndarray],
    batch_size: int,
    transforms: tuple[Transform, ...],
) -> jax.Array:
    """The probability that each of M members gives each of N examples' class, [M, N]."""

    def of_batch(batch: Batch) -> jax.Array:
        outputs, _ = ensemble_network.apply(variables, batch["image"], train=False)
        losses = jax.vmap(negative_log_likelihood, (1, None), 1)
        return jnp.exp(-losses(outputs["member_logits"], batch["label"]))

    return map_rows(of_batch, _examples(dataset), batch_size=batch_size, transforms=transforms).T
