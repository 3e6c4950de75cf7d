"""DecAug: a category and a context branch with orthogonal gradients, and context features pushed off.

Haoyue Bai, Rui Sun, Lanqing Hong, Fengwei Zhou, Nanyang Ye, Han-Jia Ye, S.-H. Gary Chan, Zhenguo Li. *DecAug:
Out-of-Distribution Generalization via Decomposed Feature Representation and Semantic Augmentation*. AAAI 2021
(arXiv 2012.09382). Official code: HaoyueBaiZJU/DecAug.

From the features z of a backbone, one branch makes an embedding that tells the class, another one that
tells the context. The classes are predicted from both; in training the context embedding is first moved
along the gradient that raises the context loss.

The paper and its code differ, and `DecAugConfig` has a field for each difference. The column of the paper is
its usual reading, not checked against its equations. A sum over the batch grows with it; the code has 64.

| | `OFFICIAL`, as released | `PAPER`, as written |
|---|---|---|
| `branch_loss_input` | "probabilities": a second softmax on top of the first | "logits" |
| `orth_reduction` | "sum" over the batch | "mean" |
| `orth_stop_gradient` | True: only the branches' weights see it | False: the backbone too |
| `ratio_mode` | "per_batch": one draw for all | "per_example" |
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxlab.core import Batch, Method, Network, Outputs, UserError, Variables
from jaxlab.core.updates import TrainState, gradient_update
from jaxlab.methods.domain_generalization.environments import merge
from jaxlab.metrics.classification import correct, negative_log_likelihood
from jaxlab.nn.layers import FAN_IN_UNIFORM, dense, symmetric_uniform


class DecAugOutputs(NamedTuple):
    """What the head makes of features z [B, d].

    Attributes:
      category_embedding: z_cat [B, d].
      context_embedding: z_ctx [B, d].
      category_logits: [B, K].
      context_logits: [B, C].
    """

    category_embedding: jax.Array
    context_embedding: jax.Array
    category_logits: jax.Array
    context_logits: jax.Array


class DecAugConfig(NamedTuple):
    """Weights and forms of the losses; see the module's docstring for what the paper and the code have.

    Attributes:
      lambda_category: of the category branch's loss (`balance1` of the code).
      lambda_context: of the context branch's loss (`balance2`).
      lambda_orth: of the orthogonality (`balanceorth`).
      orth_reduction: "sum" or "mean" over the batch.
      branch_loss_input: what the branch losses take for logits: "probabilities" or "logits".
      orth_stop_gradient: whether the probabilities and, in a branch that is not linear, z are constants in
        the gradients that are to be orthogonal.
      ratio_mode: whether the share α ~ U[0, 1) of the radius is drawn "per_batch" or "per_example".
      radius: ε, the longest move of a context embedding (`perturbation`).
      eps: δ, added to norms (`epsilon`).
    """

    lambda_category: float = 0.01
    lambda_context: float = 0.01
    lambda_orth: float = 0.01
    orth_reduction: Literal["sum", "mean"] = "sum"
    branch_loss_input: Literal["probabilities", "logits"] = "probabilities"
    orth_stop_gradient: bool = True
    ratio_mode: Literal["per_batch", "per_example"] = "per_batch"
    radius: float = 1.0
    eps: float = 1e-8


OFFICIAL = DecAugConfig()
PAPER = DecAugConfig(
    orth_reduction="mean", branch_loss_input="logits", orth_stop_gradient=False, ratio_mode="per_example"
)


# --- The pure functions, in the order of the paper ---


def linear_head_feature_gradient(probs: jax.Array, labels: jax.Array, kernel: jax.Array) -> jax.Array:
    """∂CE/∂z of each example, logits = z · kernel + bias: (p - e_y) · kernelᵀ.

    Args:
      probs: p [B, K], the softmax of the logits.
      labels: y [B] integers.
      kernel: [d, K]; of a linear branch with a linear classifier, the product of their kernels.

    Returns:
      [B, d].
    """
    return (probs - jax.nn.one_hot(labels, probs.shape[-1], dtype=probs.dtype)) @ kernel.T


def feature_gradient(
    loss_fn: Callable[[jax.Array, jax.Array], jax.Array], z: jax.Array, labels: jax.Array
) -> jax.Array:
    """∂ loss_i / ∂ z_i of each example, for a head of any form.

    Args:
      loss_fn: `loss_fn(z [B, d], labels [B]) -> losses` [B], each from its own row.
      z: [B, d].
      labels: [B].

    Returns:
      [B, d].
    """
    losses, vjp = jax.vjp(lambda z: loss_fn(z, labels), z)
    return vjp(jnp.ones_like(losses))[0]


def _unit(x: jax.Array, eps: float) -> jax.Array:
    """x / (‖x‖ + eps) by rows; the gradient at a row of zeros is 0, where that of a norm would be NaN."""
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    is_zero = squares == 0
    norm = jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squares)))
    # Without this, eps would make a slope of 1 / eps out of a row of zeros.
    return jnp.where(is_zero, 0.0, x) / (norm + eps)


def orthogonality_penalty(g: jax.Array, r: jax.Array, eps: float = 1e-8) -> jax.Array:
    """The squared cosine of the angle between gradients, (ĝ · r̂)² with ĝ = g / (‖g‖ + eps).

    Args:
      g: [B, d].
      r: [B, d].
      eps: added to the norms, not inside the root.

    Returns:
      [B]; 0, with gradient 0, where a row is zero.
    """
    chex.assert_equal_shape([g, r])
    return jnp.square(jnp.sum(_unit(g, eps) * _unit(r, eps), axis=-1))


def semantic_augmentation(
    context_embedding: jax.Array, grad: jax.Array, ratio: jax.Array, radius: float, eps: float = 1e-8
) -> jax.Array:
    """z_ctx + α ε a / (‖a‖ + eps): up the context loss, by a constant move.

    Args:
      context_embedding: z_ctx [B, d].
      grad: a [B, d], the gradient of the context loss with respect to z_ctx.
      ratio: α, a scalar or [B].
      radius: ε.
      eps: added to the norm.

    Returns:
      [B, d].
    """
    move = jnp.asarray(ratio)[..., None] * radius * _unit(grad, eps)
    return context_embedding + jax.lax.stop_gradient(move)


# --- The head ---


class MLPBranch(nn.Module):
    """A branch that is not linear: hidden layers with ReLU, then a linear layer of the width of its input."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        x = z
        for i, features in enumerate(self.hidden, start=1):
            x = jax.nn.relu(dense(x, features, name=f"dense{i}"))
        return dense(x, z.shape[-1], name="out")


def mlp_branch(*, hidden: tuple[int, ...]) -> nn.Module:
    """The section of a branch in a config; `hidden` are the widths of its layers but the last."""
    return MLPBranch(hidden)


class DecAugHead(nn.Module):
    """Both branches, a linear classifier on each, and the classifier on both.

    Attributes:
      num_classes: K.
      num_contexts: C.
      feature_dim: d, of the features and of both embeddings.
      branch: from [B, d] to [B, d]; each branch is a copy of it. Linear if None.
    """

    num_classes: int
    num_contexts: int
    feature_dim: int
    branch: nn.Module | None = None

    def setup(self):
        d = self.feature_dim

        def linear(in_features: int, features: int) -> nn.Module:
            bias_init = symmetric_uniform(in_features**-0.5)
            return nn.Dense(features, kernel_init=FAN_IN_UNIFORM, bias_init=bias_init)

        def branch() -> nn.Module:
            return linear(d, d) if self.branch is None else self.branch.clone(parent=None)

        self.category_branch, self.context_branch = branch(), branch()
        self.category_classifier = linear(d, self.num_classes)
        self.context_classifier = linear(d, self.num_contexts)
        self.classifier = linear(2 * d, self.num_classes)

    def __call__(self, z: jax.Array) -> DecAugOutputs:
        """Both branches on z [B, d]."""
        z_cat, z_ctx = self.category_branch(z), self.context_branch(z)
        if self.is_initializing():
            self.classify(z_cat, z_ctx)  # so that it has parameters, too
        return DecAugOutputs(z_cat, z_ctx, self.category_classifier(z_cat), self.context_classifier(z_ctx))

    def classify(self, category_embedding: jax.Array, context_embedding: jax.Array) -> jax.Array:
        """Logits [B, K] of both embeddings, the category's first."""
        return self.classifier(jnp.concatenate([category_embedding, context_embedding], axis=-1))


# --- The loss ---


def decaug_losses(
    head: DecAugHead,
    params: Mapping[str, Any],
    z: jax.Array,
    labels: jax.Array,
    contexts: jax.Array,
    ratio: jax.Array,
    config: DecAugConfig = OFFICIAL,
) -> dict[str, jax.Array]:
    """All parts of the loss, by example.

    Args:
      head: the head.
      params: its parameters.
      z: [B, d].
      labels: y [B].
      contexts: c [B].
      ratio: α, a scalar or [B].
      config: the form of the losses.

    Returns:
      [B] each: `final`, the cross entropy of the classifier on the moved embedding; `category` and `context`,
      the branches' losses; `squared_cosine`; `shift_norm`, how far z_ctx was moved; `moved_context`, the
      context branch's cross entropy on logits after the move; `context_norm`, of z_ctx before it; and whether
      each classifier is right: `accuracy` (without the move), `category_accuracy`, `context_accuracy`.
    """
    apply = functools.partial(head.apply, {"params": params})
    outputs = apply(z)
    p, q = jax.nn.softmax(outputs.category_logits), jax.nn.softmax(outputs.context_logits)
    stop = jax.lax.stop_gradient if config.orth_stop_gradient else lambda x: x
    category_kernel, context_kernel = (params[f"{n}_classifier"]["kernel"] for n in ("category", "context"))
    if head.branch is None:
        to_category = params["category_branch"]["kernel"] @ category_kernel
        to_context = params["context_branch"]["kernel"] @ context_kernel
        g = linear_head_feature_gradient(stop(p), labels, to_category)
        r = linear_head_feature_gradient(stop(q), contexts, to_context)
    else:
        # The gradient at the embedding, as it is for a linear branch, pulled back through the branch.
        def pull_back(branch: str, at_embedding: jax.Array) -> jax.Array:
            _, vjp = jax.vjp(lambda z: getattr(apply(z), f"{branch}_embedding"), stop(z))
            return vjp(at_embedding)[0]

        g = pull_back("category", linear_head_feature_gradient(stop(p), labels, category_kernel))
        r = pull_back("context", linear_head_feature_gradient(stop(q), contexts, context_kernel))

    grad = linear_head_feature_gradient(q, contexts, context_kernel)
    moved = semantic_augmentation(outputs.context_embedding, grad, ratio, config.radius, config.eps)
    logits = apply(outputs.category_embedding, moved, method="classify")
    unmoved = apply(outputs.category_embedding, outputs.context_embedding, method="classify")
    context_bias = params["context_classifier"]["bias"]

    on_probabilities = config.branch_loss_input == "probabilities"
    return {
        "final": negative_log_likelihood(logits, labels),
        "category": negative_log_likelihood(p if on_probabilities else outputs.category_logits, labels),
        "context": negative_log_likelihood(q if on_probabilities else outputs.context_logits, contexts),
        "squared_cosine": orthogonality_penalty(g, r, config.eps),
        "shift_norm": jnp.linalg.norm(jax.lax.stop_gradient(moved - outputs.context_embedding), axis=-1),
        "moved_context": negative_log_likelihood(
            jax.lax.stop_gradient(moved @ context_kernel + context_bias), contexts
        ),
        "context_norm": jnp.linalg.norm(jax.lax.stop_gradient(outputs.context_embedding), axis=-1),
        "accuracy": correct(unmoved, labels),
        "category_accuracy": correct(outputs.category_logits, labels),
        "context_accuracy": correct(outputs.context_logits, contexts),
    }


def combine_losses(losses: Mapping[str, jax.Array], config: DecAugConfig = OFFICIAL) -> jax.Array:
    """L = mean final + λ_category mean category + λ_context mean context + λ_orth Σ or mean cos²."""
    orth = losses["squared_cosine"]
    return (
        losses["final"].mean()
        + config.lambda_category * losses["category"].mean()
        + config.lambda_context * losses["context"].mean()
        + config.lambda_orth * (orth.sum() if config.orth_reduction == "sum" else orth.mean())
    )


def draw_ratio(rng: chex.PRNGKey, batch_size: int, config: DecAugConfig = OFFICIAL) -> jax.Array:
    """α ~ U[0, 1): a scalar, or [B]."""
    return jax.random.uniform(rng, () if config.ratio_mode == "per_batch" else (batch_size,))


def decaug_loss(
    apply_fn: Callable[[Any, jax.Array], jax.Array],
    params: Mapping[str, Any],
    batch: Batch,
    rng: chex.PRNGKey,
    config: DecAugConfig = OFFICIAL,
    *,
    head: DecAugHead | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch, and its parts.

    Args:
      apply_fn: the backbone, `apply_fn(params["backbone"], image) -> z` [B, d].
      params: {"backbone": ..., "head": parameters of the head}.
      batch: {"image": [B, ...], "label": [B], "context": [B]}.
      rng: draws α.
      config: the form of the losses.
      head: the head; None: one with linear branches, of the sizes of its parameters.

    Returns:
      A scalar, and the mean of every part of `decaug_losses`.
    """
    head = head or _linear_head(params["head"])
    z = apply_fn(params["backbone"], batch["image"])
    ratio = draw_ratio(rng, len(z), config)
    losses = decaug_losses(head, params["head"], z, batch["label"], batch["context"], ratio, config)
    return combine_losses(losses, config), {name: jnp.mean(values) for name, values in losses.items()}


def decaug_predict(
    apply_fn: Callable[[Any, jax.Array], jax.Array],
    params: Mapping[str, Any],
    image: jax.Array,
    *,
    head: DecAugHead | None = None,
) -> jax.Array:
    """Logits [B, K] of both embeddings as they are; arguments as in `decaug_loss`. No context is needed."""
    head = head or _linear_head(params["head"])
    outputs = head.apply({"params": params["head"]}, apply_fn(params["backbone"], image))
    return head.apply(
        {"params": params["head"]},
        outputs.category_embedding,
        outputs.context_embedding,
        method="classify",
    )


def _linear_head(params: Mapping[str, Any]) -> DecAugHead:
    width, num_classes = params["category_classifier"]["kernel"].shape
    return DecAugHead(num_classes, params["context_classifier"]["kernel"].shape[1], width)


# --- The method ---


def logits_as_features(network: Network) -> Network:
    """A network whose features are the logits of another: with 512 of them, the paper's backbone.

    There ResNet-18 has a new linear layer of width 512 in place of its last one, without an activation.
    """

    def apply(variables, inputs, *, train, key=None):
        outputs, variables = network.apply(variables, inputs, train=train, key=key)
        return {"features": outputs["logits"]}, variables

    return network._replace(apply=apply)


def decaug(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    num_classes: int,
    num_contexts: int,
    form: Literal["official", "paper"] = "official",
    branch: nn.Module | None = None,
    lambda_category: float = 0.01,
    lambda_context: float = 0.01,
    lambda_orth: float = 0.01,
    radius: float = 1.0,
    orth_reduction: Literal["sum", "mean"] | None = None,
    branch_loss_input: Literal["probabilities", "logits"] | None = None,
    orth_stop_gradient: bool | None = None,
    ratio_mode: Literal["per_batch", "per_example"] | None = None,
) -> Method:
    """Trains a backbone and a `DecAugHead` on it.

    A batch is {"image", "label", "context"}, of examples [B, ...] or of environments [E, n, ...]. Metrics:
    `loss` and the means of `decaug_losses`. With all λ and the radius 0 it is ERM on the same head.

    Args:
      network: the backbone; only its "features" [B, d] are used; see `logits_as_features`.
      optimizer: in the paper SGD with Nesterov momentum 0.9 and weight decay 5e-4 on all parameters.
      num_classes: K.
      num_contexts: C.
      form: "official" or "paper", for what is None below.
      branch: both branches' form, for example `mlp_branch`; linear if None.
      lambda_category, lambda_context, lambda_orth, radius: see `DecAugConfig`.
      orth_reduction, branch_loss_input, orth_stop_gradient, ratio_mode: likewise; those of the form if None.
    """
    chosen = {
        "orth_reduction": orth_reduction,
        "branch_loss_input": branch_loss_input,
        "orth_stop_gradient": orth_stop_gradient,
        "ratio_mode": ratio_mode,
    }
    config = (OFFICIAL if form == "official" else PAPER)._replace(
        lambda_category=lambda_category,
        lambda_context=lambda_context,
        lambda_orth=lambda_orth,
        radius=radius,
        **{name: value for name, value in chosen.items() if value is not None},
    )

    def head_of(width: int) -> DecAugHead:
        return DecAugHead(num_classes, num_contexts, width, branch)

    def init(key: chex.PRNGKey, batch: Batch) -> TrainState:
        backbone_key, head_key = jax.random.split(key)
        image, _, _ = _rows(batch)
        variables = network.init(backbone_key, image)
        features = jax.eval_shape(lambda: network.apply(variables, image, train=False)[0]["features"])
        width = features.shape[-1]
        head = head_of(width).init(head_key, jnp.zeros((1, width)))["params"]
        params = {"backbone": variables["params"], "head": head}
        return TrainState({**variables, "params": params}, optimizer.init(params))

    def update(state: TrainState, batch: Batch, key: chex.PRNGKey) -> tuple[TrainState, dict[str, jax.Array]]:
        image, labels, contexts = _rows(batch)
        ratio_key, dropout_key = jax.random.split(key)
        ratio = draw_ratio(ratio_key, len(labels), config)

        def objective(variables: Variables) -> tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]:
            params = variables["params"]
            outputs, updated = network.apply(
                {**variables, "params": params["backbone"]}, image, train=True, key=dropout_key
            )
            z = outputs["features"]
            losses = decaug_losses(head_of(z.shape[-1]), params["head"], z, labels, contexts, ratio, config)
            metrics = {name: jnp.mean(values) for name, values in losses.items()}
            return combine_losses(losses, config), ({**updated, "params": params}, metrics)

        variables, opt_state, metrics = gradient_update(objective, optimizer, *state)
        return TrainState(variables, opt_state), metrics

    def predict(state: TrainState, batch: Batch) -> Outputs:
        params = state.variables["params"]
        backbone = {**state.variables, "params": params["backbone"]}
        z = network.apply(backbone, batch["image"], train=False)[0]["features"]
        head, variables = head_of(z.shape[-1]), {"params": params["head"]}
        outputs = head.apply(variables, z)
        embeddings = outputs.category_embedding, outputs.context_embedding
        return {
            "logits": head.apply(variables, *embeddings, method="classify"),
            "features": jnp.concatenate(embeddings, axis=-1),
            "category_logits": outputs.category_logits,
            "context_logits": outputs.context_logits,
        }

    return Method(init, update, predict)


def _rows(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Images, labels and contexts with one batch axis."""
    if "context" not in batch:
        raise UserError("decaug: batches have no 'context'; take streams.environments or such a data set.")
    columns = batch["image"], batch["label"], batch["context"]
    return columns if batch["label"].ndim == 1 else tuple(merge(column) for column in columns)
