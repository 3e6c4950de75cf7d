"""Out-of-distribution scores of a classifier's features: distances, directions and norms.

Those by nearest neighbours are in `neighbor_scores.py`, those by altered features in `activation_shaping.py`.

All are **larger for OOD examples**. What is fitted has `fit_*(features, logits, labels, head, ...) -> state`,
a pytree of arrays, from features [N, D], logits [N, C] and integer labels [N] of training data and the
network's last layer, head = (kernel [D, C], bias [C]); then `*_score(state, features, logits) -> [B]` from
features [B, D] and logits [B, C]. All of it can be compiled. Products are in full float32, for most scores
are small differences of large numbers.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxlab.core import UserError
from jaxlab.methods.ood_detection.energy import at_least_float32, energy
from jaxlab.methods.ood_detection.logit_scores import Head, ScoreState, signed_step

_SHORTEST = 1e-10  # of a length that is divided by: features at their mean score without a NaN


def fit_mahalanobis(features: jax.Array, logits: jax.Array, labels: jax.Array, head: Head) -> ScoreState:
    """Gaussians of one covariance, one for each class.

    Lee, Lee, Lee & Shin, *A Simple Unified Framework for Detecting Out-of-Distribution Samples and
    Adversarial Attacks*, NeurIPS 2018, as Liu et al. (2020) simplify it: features of the last layer alone.

    Args:
      features: [N, D].
      labels: [N]; a class that has no example takes no part.
      logits: not used.
      head: tells the number of classes.

    Returns:
      `centre` [D], the mean of all features; `whitening` [D, D], whose product with its transpose is the
      pseudo-inverse of the covariance Σ (h - μ_y)(h - μ_y)ᵀ / N; `class_means` [C, D], centred and whitened;
      `present` [C] bool.
    """
    return _fit_gaussians(features, labels, head[1].shape[0])


def mahalanobis_score(state: ScoreState, features: jax.Array, logits: jax.Array) -> jax.Array:
    """min_c ½ (h - μ_c)ᵀ Σ⁺ (h - μ_c), [B, D] -> [B]; the logits are not used."""
    centred = at_least_float32(features) - state["centre"]
    whitened = jnp.matmul(centred, state["whitening"], precision="highest")

    # A class at a time: Σ (z - m)² as |z|² - 2zm + |m|² would lose what is small beside the class means.
    def distance(means_and_presence: tuple[jax.Array, jax.Array]) -> jax.Array:
        mean, present = means_and_presence
        return jnp.where(present, jnp.sum((whitened - mean) ** 2, axis=-1), jnp.inf)

    return jnp.min(jax.lax.map(distance, (state["class_means"], state["present"])), axis=0) / 2


def mahalanobis_perturb(
    state: ScoreState,
    predict: Callable[[jax.Array], jax.Array],
    inputs: jax.Array,
    epsilon: float,
    input_std: float | tuple[float, ...] = 1.0,
) -> jax.Array:
    """Moves inputs towards the nearest class, as ODIN does.

    Args:
      state: of `fit_mahalanobis`.
      predict: inputs -> features [B, D], in evaluation mode and differentiable.
      inputs, epsilon, input_std: as for `signed_step`.
    """

    def loss(inputs: jax.Array) -> jax.Array:
        return jnp.sum(mahalanobis_score(state, predict(inputs), None))

    return signed_step(loss, inputs, epsilon, input_std)


def fit_relative_mahalanobis(
    features: jax.Array, logits: jax.Array, labels: jax.Array, head: Head
) -> dict[str, ScoreState]:
    """What `fit_mahalanobis` fits, for the `classes` and for all of the data as the `background`.

    Ren, Fort, Liu et al., *A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection*, 2021
    (arXiv 2106.09022).
    """
    return {
        "classes": fit_mahalanobis(features, logits, labels, head),
        "background": _fit_gaussians(features, jnp.zeros_like(labels), 1),
    }


def relative_mahalanobis_score(
    state: dict[str, ScoreState], features: jax.Array, logits: jax.Array
) -> jax.Array:
    """min_c d_c - d_0 of the squared distances (no ½) to the classes and the background; [B, D] -> [B]."""
    classes, background = (mahalanobis_score(state[k], features, logits) for k in ("classes", "background"))
    return 2 * (classes - background)


def fit_vim(
    features: jax.Array, logits: jax.Array, labels: jax.Array, head: Head, *, dim: int | None = None
) -> ScoreState:
    """The subspace that features hardly reach, and how a distance within it compares with a logit.

    Wang, Li, Feng & Zhang, *ViM: Out-Of-Distribution with Virtual-logit Matching*, CVPR 2022.

    Args:
      features: [N, D].
      logits: [N, C] of the same examples.
      labels: not used.
      head: its biases set the origin of the features.
      dim: of the principal subspace; None: 1000 if D >= 2048, 512 if D >= 768, else D // 2. OpenOOD: 256.

    Returns:
      `origin` [D], -pinv(W) b; `null_space` [D, D - dim]; `alpha`, the mean largest logit over the mean
      length of the features' part in the null space (0 where that is 0).

    Raises:
      UserError: `dim` is not within 0 and D - 1.
    """
    state = _fit_null_space(features, head, dim)
    length = jnp.mean(residual_score(state, features, logits))
    largest = jnp.mean(jnp.max(at_least_float32(logits), axis=-1))
    return state | {"alpha": jnp.where(length > 0, largest / jnp.where(length > 0, length, 1), 0)}


def vim_score(state: ScoreState, features: jax.Array, logits: jax.Array) -> jax.Array:
    """α ‖(h - u) R‖ - LSE(f), [B, D], [B, C] -> [B]."""
    return state["alpha"] * residual_score(state, features, logits) + energy(logits)


def fit_residual(
    features: jax.Array, logits: jax.Array, labels: jax.Array, head: Head, *, dim: int | None = None
) -> ScoreState:
    """`origin` and `null_space` of `fit_vim`, without the logits; the arguments are those of `fit_vim`."""
    return _fit_null_space(features, head, dim)


def residual_score(state: ScoreState, features: jax.Array, logits: jax.Array) -> jax.Array:
    """‖(h - u) R‖, the length within the null space; [B, D] -> [B]. The logits are not used."""
    offset = at_least_float32(features) - state["origin"]
    return jnp.linalg.norm(jnp.matmul(offset, state["null_space"], precision="highest"), axis=-1)


def fit_she(features: jax.Array, logits: jax.Array, labels: jax.Array, head: Head) -> ScoreState:
    """The mean features of the training examples of each class that are classified correctly.

    Zhang, Fu, Chen et al., *Out-of-Distribution Detection based on In-Distribution Data Patterns Memorization
    with Modern Hopfield Energy*, ICLR 2023.

    Args:
      features: [N, D].
      logits: [N, C].
      labels: [N].
      head: not used.

    Returns:
      `patterns` [C, D], zeros for a class without such examples.
    """
    num_classes = logits.shape[-1]
    right = jnp.argmax(logits, axis=-1) == labels
    patterns, _ = _class_means(at_least_float32(features), jnp.where(right, labels, num_classes), num_classes)
    return {"patterns": patterns}


def she_score(state: ScoreState, features: jax.Array, logits: jax.Array) -> jax.Array:
    """-h · pattern of the predicted class, [B, D], [B, C] -> [B]."""
    patterns = jnp.take(state["patterns"], jnp.argmax(logits, axis=-1), axis=0)
    return -jnp.sum(at_least_float32(features) * patterns, axis=-1)


def fit_fdbd(features: jax.Array, logits: jax.Array, labels: jax.Array, head: Head) -> ScoreState:
    """The mean training feature, and the distances between the weights of every two classes.

    Liu & Qin, *Fast Decision Boundary based Out-of-Distribution Detector*, ICML 2024.

    Args:
      features: [N, D].
      logits, labels: not used.
      head: of the network.

    Returns:
      `mean` [D] and `weight_distances` [C, C].
    """
    weights = head[0].T
    distances = jax.lax.map(lambda weight: jnp.linalg.norm(weights - weight, axis=-1), weights)
    return {"mean": jnp.mean(at_least_float32(features), axis=0), "weight_distances": distances}


def fdbd_score(state: ScoreState, features: jax.Array, logits: jax.Array) -> jax.Array:
    """-Σ_c |f_c - f_ŷ| / ‖w_ŷ - w_c‖ / ‖h - mean h‖, [B, D], [B, C] -> [B].

    The sum of the distances to the decision boundaries of the predicted class ŷ, over the distance to the
    mean training feature. Classes of the same weights have no boundary, and their term is 0.
    """
    logits = at_least_float32(logits)
    predicted = jnp.argmax(logits, axis=-1)
    between = jnp.take(state["weight_distances"], predicted, axis=0)
    gaps = jnp.max(logits, axis=-1, keepdims=True) - logits
    distances = jnp.where(between > 0, gaps / jnp.where(between > 0, between, 1), 0)
    _, length = _centred(features, state["mean"])
    return -jnp.sum(distances, axis=-1) / length


def fit_nci(features: jax.Array, logits: jax.Array, labels: jax.Array, head: Head) -> ScoreState:
    """The mean training feature `mean` [D], and the weights `kernel` [D, C].

    Liu & Qin, *Detecting Out-of-distribution through the Lens of Neural Collapse*, CVPR 2025 (arXiv
    2311.01479).
    """
    return {"mean": jnp.mean(at_least_float32(features), axis=0), "kernel": head[0]}


def nci_score(state: ScoreState, features: jax.Array, logits: jax.Array, *, alpha: float = 1e-4) -> jax.Array:
    """-(w_ŷ · (h - mean) / ‖h - mean‖ + α ‖h‖₁), [B, D], [B, C] -> [B].

    How far the features point along the weights of the predicted class ŷ, and away from zero. `alpha` is
    chosen on validation data, from 1e-4 (OpenOOD's default) to 0.1.
    """
    weights = jnp.take(state["kernel"].T, jnp.argmax(logits, axis=-1), axis=0)
    centred, length = _centred(features, state["mean"])
    return -jnp.sum(weights * centred, axis=-1) / length - alpha * _l1_norm(features)


def grad_norm_score(features: jax.Array, logits: jax.Array) -> jax.Array:
    """-‖∂(-Σ_c log p_c)/∂W‖₁ of the last layer, [B, D], [B, C] -> [B].

    Huang, Geng & Li, *On the Importance of Gradients for Detecting Distributional Shifts in the Wild*,
    NeurIPS 2021, in closed form: the gradient is the outer product of h and C p - 1.
    """
    probabilities = jax.nn.softmax(at_least_float32(logits))
    return -_l1_norm(features) * _l1_norm(logits.shape[-1] * probabilities - 1)


def _fit_gaussians(features: jax.Array, labels: jax.Array, num_classes: int) -> ScoreState:
    chex.assert_rank([features, labels], [2, 1])
    chex.assert_equal_shape_prefix([features, labels], 1)
    features = at_least_float32(features)
    centre = jnp.mean(features, axis=0)
    centred = features - centre
    means, counts = _class_means(centred, labels, num_classes)
    values, vectors = _principal_axes(centred - means[labels])
    # The cut of a pseudo-inverse: directions of no variance but for rounding do not count.
    kept = values > values.size * jnp.finfo(values.dtype).eps * values[-1]
    whitening = vectors * jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, 1)), 0)
    return {
        "centre": centre,
        "whitening": whitening,
        "class_means": jnp.matmul(means, whitening, precision="highest"),
        "present": counts > 0,
    }


def _class_means(features: jax.Array, labels: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """Means [C, D], zero for an empty class, and counts [C]; a label beyond the classes counts nowhere."""
    counts = jnp.bincount(labels, length=num_classes)
    sums = jax.ops.segment_sum(features, labels, num_classes)
    return sums / jnp.maximum(counts, 1)[:, None], counts


def _principal_axes(centred: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ascending eigenvalues [D] and eigenvectors [D, D] of the second moments of rows [N, D]."""
    moments = jnp.matmul(centred.T, centred, precision="highest") / centred.shape[0]
    return jnp.linalg.eigh(moments)


def _fit_null_space(features: jax.Array, head: Head, dim: int | None) -> ScoreState:
    size = features.shape[-1]
    if dim is None:
        dim = 1000 if size >= 2048 else 512 if size >= 768 else size // 2
    if not 0 <= dim < size:
        raise UserError(f"dim: expected 0 to {size - 1}, for there are {size} features, got {dim}.")
    kernel, bias = head
    origin = -jnp.matmul(jnp.linalg.pinv(kernel.T), bias, precision="highest")
    _, vectors = _principal_axes(at_least_float32(features) - origin)
    return {"origin": origin, "null_space": vectors[:, : size - dim]}


def _centred(features: jax.Array, mean: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Features [B, D] without their mean, and their lengths [B], which are never 0."""
    centred = at_least_float32(features) - mean
    return centred, jnp.maximum(jnp.linalg.norm(centred, axis=-1), _SHORTEST)


def _l1_norm(values: jax.Array) -> jax.Array:
    return jnp.sum(jnp.abs(at_least_float32(values)), axis=-1)
