"""Linear probing: a new head on features that stay as they are.

Kumar et al., ICLR 2022 (arXiv 2202.10054), as their code does it: multinomial logistic regression for each C
of a grid, from the solution of the C before, on features normalised by one mean and one deviation; the C with
the best accuracy on validation data in distribution is taken, of several the smallest. Heads of the functions
below are scikit-learn's, W [classes, F] and b [classes]; `set_head` writes them into parameters.

The official code extracts features once from augmented training images; here they are of the images as they
are evaluated.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from jaxlab.core import Batch, Method, Network, UserError, Variables
from jaxlab.data.transforms import Transform
from jaxlab.methods.transfer.evaluation import select_on
from jaxlab.methods.transfer.phases import Phase, in_phases, start_from, unchanging
from jaxlab.methods.transfer.trainable import HEAD
from jaxlab.metrics.outputs import map_rows

Dataset = Mapping[str, np.ndarray]
# `solver(z, y, C, start) -> (W, b)` with `start` the (W, b) of the C before, or None.
Solver = Callable[..., tuple[np.ndarray, np.ndarray]]


def normalize_features(feats: ArrayLike, ref: ArrayLike) -> tuple[np.ndarray, float, float]:
    """(feats - μ) / s with the one mean and the one population deviation of all entries of `ref`.

    Args:
      feats: [N, F].
      ref: [M, F], the training features.

    Returns:
      [N, F], μ and s.

    Raises:
      UserError: the reference is constant, so that s is 0.
    """
    feats, ref = np.asarray(feats), np.asarray(ref)
    mu, s = float(ref.mean(dtype=np.float64)), float(ref.std(dtype=np.float64))
    if not s > 0:
        raise UserError("linear_probe: the features are all the same number; the encoder is dead.")
    return (feats - mu) / s, mu, s


def fold_normalization(W: ArrayLike, b: ArrayLike, mu: float, s: float) -> tuple[np.ndarray, np.ndarray]:
    """The head on raw features that is (W, b) on normalised ones: W / s and b - (μ / s) Σ_j W_·j."""
    W, b = np.asarray(W), np.asarray(b)
    return W / s, b - mu / s * W.sum(1)


def lbfgs(
    z: np.ndarray, y: np.ndarray, C: float, start: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Minimises ½‖W‖² + C Σ_i CE_i, with b free, by at most 200 steps of L-BFGS (scikit-learn).

    Args:
      z: [N, F].
      y: [N], of at least two classes; of two there is one row, of the second class.
      C: the inverse of the regularisation.
      start: (W, b) to start from.

    Returns:
      W [classes, F] and b [classes].
    """
    model = LogisticRegression(C=C, max_iter=200, warm_start=start is not None)
    if start is not None:
        model.coef_, model.intercept_ = start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the official grid has such values
        model.fit(z, y)
    return model.coef_, model.intercept_


def fit_linear_probe(
    z: ArrayLike, y: ArrayLike, Cs: ArrayLike, val: tuple[ArrayLike, ArrayLike], solver: Solver = lbfgs
) -> tuple[np.ndarray, np.ndarray, float, list[dict[str, float]]]:
    """The probe with the best validation accuracy over C, the smallest C of several.

    Args:
      z: [N, F] normalised features.
      y: [N] integer labels.
      Cs: taken in ascending order, each from the solution before; np.logspace(-7, 2, 50) in the paper.
      val: features [M, F], normalised as `z` are, and labels [M].
      solver: `solver(z, y, C, start) -> (W, b)`.

    Returns:
      W and b as `solver` has them, rows in the order of `np.unique(y)`; C; and the table, a row
      {"C", "accuracy"} of each C, of accuracies on `val`.

    Raises:
      UserError: a single class, no or negative C, or features that are not finite.
    """
    z, y, Cs = np.asarray(z, np.float64), np.asarray(y), np.sort(np.asarray(Cs, np.float64).ravel())
    val_z, val_y = np.asarray(val[0], np.float64), np.asarray(val[1])
    classes = np.unique(y)
    if len(classes) < 2:
        raise UserError(f"linear_probe: the training labels are of {len(classes)} class; give two or more.")
    if len(Cs) == 0 or Cs[0] <= 0:
        raise UserError("linear_probe: Cs must be positive, at least one.")
    if not (np.isfinite(z).all() and np.isfinite(val_z).all()):
        raise UserError("linear_probe: the features are not finite; the encoder has diverged.")
    heads, table, head = [], [], None
    # In products this small BLAS's threads wait for each other: 500 × 256 took 27 s with two, 2 s with one.
    threads = 1 if z.size < 2**22 else None
    for C in Cs:
        with threadpool_limits(threads):
            head = solver(z, y, C, head)
        heads.append(head)
        W, b = binary_to_softmax(*head)
        hit = classes[np.argmax(val_z @ W.T + b, axis=1)] == val_y
        table.append({"C": float(C), "accuracy": float(hit.mean())})
    best = select_on(table, "accuracy")
    return *heads[table.index(best)], best["C"], table


def pad_head(
    W: ArrayLike, b: ArrayLike, classes: ArrayLike, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """A head of all classes, with zeros for those that training had no example of: logits 0, not -∞.

    Args:
      W: [len(classes), F].
      b: [len(classes)].
      classes: the class of each row.
      num_classes: K.

    Returns:
      W [K, F] and b [K].

    Raises:
      UserError: a class is not in 0..K - 1, or the rows are not as many as the classes.
    """
    W, b, classes = np.asarray(W), np.asarray(b), np.asarray(classes)
    if len(W) != len(classes) or len(b) != len(classes):
        raise UserError(f"pad_head: {len(W)} rows for {len(classes)} classes.")
    if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
        raise UserError(
            f"pad_head: classes are in {classes.min()}..{classes.max()}, not 0..{num_classes - 1}."
        )
    padded_W, padded_b = np.zeros((num_classes, W.shape[1]), W.dtype), np.zeros(num_classes, b.dtype)
    padded_W[classes], padded_b[classes] = W, b
    return padded_W, padded_b


def binary_to_softmax(w: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """One row as two, (-w/2, w/2), whose softmax is the sigmoid; heads of more rows as they are."""
    w, b = np.atleast_2d(np.asarray(w)), np.atleast_1d(np.asarray(b))
    if len(w) > 1:
        return w, b
    return np.concatenate([-w / 2, w / 2]), np.concatenate([-b / 2, b / 2])


def rescale_head(W: ArrayLike, b: ArrayLike, ref_std: float) -> tuple[np.ndarray, np.ndarray]:
    """W and b times ref_std / std(W), the population deviation over all entries (`normalize_lp`).

    Raises:
      UserError: W is constant.
    """
    W, b = np.asarray(W), np.asarray(b)
    std = W.std()
    if not std > 0:
        raise UserError("rescale_head: the weights are all the same number.")
    return W * (ref_std / std), b * (ref_std / std)


def set_head(params: Mapping[str, chex.ArrayTree], W: ArrayLike, b: ArrayLike) -> dict[str, chex.ArrayTree]:
    """Parameters whose head is W [K, F], b [K]: `head` becomes {"kernel": Wᵀ [F, K], "bias": b}, float32.

    Raises:
      UserError: there is no head, or it is of other features.
    """
    if HEAD not in params:
        raise UserError(f"set_head: no 'head' among the parameters: {', '.join(params)}.")
    W, b = jnp.asarray(W, jnp.float32), jnp.asarray(b, jnp.float32)
    features = params[HEAD]["kernel"].shape[0]
    if W.ndim != 2 or W.shape[1] != features or b.shape != W.shape[:1]:
        raise UserError(
            f"set_head: W must be [classes, {features}] and b [classes], got {W.shape} and {b.shape}."
        )
    return {**params, HEAD: {"kernel": W.T, "bias": b}}


def exact(
    network: Network,
    *,
    dataset: Dataset,
    validation: Dataset,
    pretrained_network: Network | None = None,
    num_values: int = 50,
    normalize: bool = False,
    batch_size: int = 512,
    transforms: tuple[Transform, ...] = (),
) -> Method:
    """LP as in the paper's runs: the features once, then `fit_linear_probe`, all in `init`.

    scikit-learn runs on the host, a seed at a time. One update is all, and only measures (config.steps=1).
    Metrics: `loss` and `accuracy` on the training batch.

    Args:
      network, pretrained_network: see `phases.in_phases`.
      dataset: the training columns `image` and `label`.
      validation: in-distribution columns that choose C.
      num_values: of C, from 1e-7 to 100, evenly in their logarithm.
      normalize: whether the head is brought to the deviation of a fresh one (`rescale_head`).
      batch_size: rows per forward pass.
      transforms: the deterministic transforms of evaluation.

    Raises:
      UserError: too few values of C, or what `fit_linear_probe` refuses.
    """
    if num_values < 1:
        raise UserError(f"num_values: expected 1 or more values of C, got {num_values}.")
    Cs = np.logspace(-7, 2, num_values)
    y, val_y = np.asarray(dataset["label"]), np.asarray(validation["label"])

    def fit(features: Any, val_features: Any, std: Any, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
        z, mu, s = normalize_features(features, features)
        val_z, _, _ = normalize_features(val_features, features)
        W, b, _, _ = fit_linear_probe(z, y, Cs, (val_z, val_y))
        W, b = fold_normalization(*binary_to_softmax(W, b), mu, s)
        W, b = pad_head(W, b, np.unique(y), num_classes)
        if normalize:
            W, b = rescale_head(W, b, float(std))
        return W.astype(np.float32), b.astype(np.float32)

    def variables_of(key: chex.PRNGKey, batch: Batch) -> tuple[Variables, Variables]:
        initial = start_from(network, pretrained_network, key, batch["image"])
        kernel = initial["params"][HEAD]["kernel"]

        def features(batch: Batch) -> jax.Array:
            return network.apply(initial, batch["image"], train=False)[0]["features"]

        of_sets = [
            map_rows(features, {"image": columns["image"]}, batch_size=batch_size, transforms=transforms)
            for columns in (dataset, validation)
        ]
        num_features, num_classes = kernel.shape
        shapes = tuple(
            jax.ShapeDtypeStruct(shape, jnp.float32)
            for shape in ((num_classes, num_features), (num_classes,))
        )
        W, b = jax.pure_callback(
            lambda *x: fit(*map(np.asarray, x), num_classes),
            shapes,
            *of_sets,
            jnp.std(kernel),
            vmap_method="sequential",
        )
        return {**initial, "params": set_head(initial["params"], W, b)}, initial

    return unchanging(network, variables_of)


def linear_probe(
    network: Network, optimizer: optax.GradientTransformation, *, pretrained_network: Network | None = None
) -> Method:
    """LP by gradient descent, the network in evaluation mode, as the paper has it for ImageNet."""
    phase = Phase(optimizer, trainable=HEAD)
    return in_phases(network, (phase,), pretrained_network=pretrained_network)
