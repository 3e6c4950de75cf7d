"""Why fine-tuning distorts features: the two-layer linear model of the paper, exactly.

Ananya Kumar, Aditi Raghunathan, Robbie Jones, Tengyu Ma, Percy Liang. *Fine-Tuning can Distort Pretrained
Features and Underperform Out-of-Distribution*. ICLR 2022 (arXiv 2202.10054), Section 3. There is no official
code of this part.

f(x) = vᵀBx with features B [k, d] and head v [k], hence with the effective weight w = Bᵀv. Training inputs
lie in a subspace S of m dimensions, test inputs out of distribution anywhere. The loss is a plain sum of
squares, which gradient flow (or gradient descent, its Euler steps) minimises from pretrained features B₀: of
the head alone (linear probing, LP), of both from a random head (fine-tuning, FT), or of both from LP's head
(LP-FT).

Two things hold at every time of FT: B(t)x = B₀x for x ⊥ S, for gradient descent too; and the `balance`
vvᵀ - BBᵀ is what it was, for the flow. Everything here is in the dtype of its arguments. The figures need
float64: call it all within `jax.enable_x64(True)`.
"""

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.core import UserError

Integrator = Literal["euler", "rk4"]


class TwoLayerProblem(NamedTuple):
    """A problem that pretrained features solve up to ε; see `make_two_layer_problem`.

    Attributes:
      X: [n, d], training inputs; their rows span S.
      Y: [n], X w*.
      F: [d, m], an orthonormal basis of S.
      B_star: [k, d], the true features, orthonormal rows.
      v_star: [k], the true head, of length 1.
      B0: [k, d], the pretrained features, orthonormal rows.
    """

    X: jax.Array
    Y: jax.Array
    F: jax.Array
    B_star: jax.Array
    v_star: jax.Array
    B0: jax.Array

    @property
    def w_star(self) -> jax.Array:
        """[d], B*ᵀv*."""
        return self.B_star.T @ self.v_star


def make_two_layer_problem(
    key: chex.PRNGKey, d: int, m: int, k: int, n: int, eps: jax.Array | float
) -> TwoLayerProblem:
    """A random problem with d(B₀, B*) = ε exactly: all principal angles are 2 arcsin(ε/2).

    Training inputs are N(0, 1/n) in S; 1/n sets no more than the scale of time. In float64 within
    `jax.enable_x64(True)`, else in float32.

    Args:
      key: one key gives the same problem for every ε, but for B₀.
      d: dimensions of the inputs.
      m: dimensions of S.
      k: number of features, k < m < d - k.
      n: number of examples, at least m.
      eps: ε in [0, √2]; may be traced.

    Raises:
      UserError: sizes or ε out of range.
    """
    if not 0 < k < m < d - k:
        raise UserError(f"two_layer: needs 0 < k < m < d - k, got k = {k}, m = {m}, d = {d}.")
    if n < m:
        raise UserError(f"two_layer: n is {n}; give at least m = {m} examples, so that they span S.")
    if not isinstance(eps, jax.core.Tracer) and not 0 <= float(eps) <= np.sqrt(2):
        raise UserError(f"two_layer: eps is {eps}; it must be in 0..√2.")
    dtype = jnp.result_type(float)

    # Drawn in float32: 64 random bits cannot be drawn where x64 is enabled inside a compiled program.
    def gaussian(key: chex.PRNGKey, *shape: int) -> jax.Array:
        return jax.random.normal(key, shape, jnp.float32).astype(dtype)

    subspace_key, features_key, rotation_key, head_key, inputs_key = jax.random.split(key, 5)
    F = jnp.linalg.qr(gaussian(subspace_key, d, m))[0]
    rows = jnp.linalg.qr(gaussian(features_key, d, 2 * k))[0].T
    B_star, N = rows[:k], rows[k:]
    U = jnp.linalg.qr(gaussian(rotation_key, k, k))[0]
    v_star = gaussian(head_key, k)
    v_star /= jnp.linalg.norm(v_star)
    half = jnp.asarray(eps, dtype) / 2  # sin(θ/2)
    cos, sin = 1 - 2 * half**2, 2 * half * jnp.sqrt(1 - half**2)
    X = gaussian(inputs_key, n, m) @ F.T / np.sqrt(n)
    return TwoLayerProblem(X, X @ (B_star.T @ v_star), F, B_star, v_star, B0=U @ (cos * B_star + sin * N))


# --- The model and its training ---


def two_layer_predict(v: jax.Array, B: jax.Array, x: jax.Array) -> jax.Array:
    """f(x) = vᵀBx; [k], [k, d], [n, d] -> [n]."""
    return x @ (B.T @ v)


def two_layer_loss(v: jax.Array, B: jax.Array, X: jax.Array, Y: jax.Array) -> jax.Array:
    """‖XBᵀv - Y‖², the sum of squares without 1/n or 1/2; a scalar."""
    return jnp.sum(jnp.square(two_layer_predict(v, B, X) - Y))


def gradient_flow_step(
    v: jax.Array,
    B: jax.Array,
    X: jax.Array,
    Y: jax.Array,
    dt: float,
    method: Integrator = "euler",
    train_features: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """One step of v̇ = -2Br, Ḃ = -2vrᵀ with r = Xᵀ(XBᵀv - Y).

    Args:
      v: [k].
      B: [k, d].
      X: [n, d].
      Y: [n].
      dt: the length of the step; of gradient descent the learning rate.
      method: "euler", which is gradient descent of both layers at once, or "rk4", Runge-Kutta's of order 4.
      train_features: False keeps B, the flow of LP.

    Returns:
      v and B after the step.

    Raises:
      UserError: unknown method.
    """

    def velocity(v: jax.Array, B: jax.Array) -> tuple[jax.Array, jax.Array]:
        r = (two_layer_predict(v, B, X) - Y) @ X
        return -2 * B @ r, -2 * jnp.outer(v, r) if train_features else jnp.zeros_like(B)

    def moved(by: tuple[jax.Array, jax.Array], dt: float) -> tuple[jax.Array, jax.Array]:
        return v + dt * by[0], B + dt * by[1]

    first = velocity(v, B)
    if method == "euler":
        return moved(first, dt)
    if method != "rk4":
        raise UserError(f"two_layer: no method '{method}'; it may be euler or rk4.")
    second = velocity(*moved(first, dt / 2))
    third = velocity(*moved(second, dt / 2))
    fourth = velocity(*moved(third, dt))
    slopes = (first, second, third, fourth)
    return moved(jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, *slopes), dt)


def id_and_ood_error(w: jax.Array, w_star: jax.Array, F: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean squared errors for x = Fz, z ~ N(0, I), in distribution, and for x ~ N(0, I), out of it.

    Args:
      w: [d], an effective weight.
      w_star: [d], the true one.
      F: [d, m], an orthonormal basis of S.

    Returns:
      Two scalars.
    """
    error = w - w_star
    return jnp.sum(jnp.square(F.T @ error)), jnp.sum(jnp.square(error))


def run_flow(
    v: jax.Array,
    B: jax.Array,
    X: jax.Array,
    Y: jax.Array,
    dt: float,
    method: Integrator = "euler",
    train_features: bool = True,
    *,
    w_star: jax.Array,
    F: jax.Array,
    num_steps: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """T steps of `gradient_flow_step`, as one `lax.scan`.

    Args:
      v, B, X, Y, dt, method, train_features: as for `gradient_flow_step`.
      w_star: [d], the true effective weight.
      F: [d, m], an orthonormal basis of the inputs in distribution.
      num_steps: T.

    Returns:
      v [k], B [k, d], and [T + 1, 3]: the training loss and the errors in and out of distribution
      (`id_and_ood_error`), before each step and after the last.
    """

    def metrics(v: jax.Array, B: jax.Array) -> jax.Array:
        return jnp.stack([two_layer_loss(v, B, X, Y), *id_and_ood_error(B.T @ v, w_star, F)])

    def step(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        return gradient_flow_step(*carry, X, Y, dt, method, train_features), metrics(*carry)

    (v, B), before = jax.lax.scan(step, (v, B), length=num_steps)
    return v, B, jnp.concatenate([before, metrics(v, B)[None]])


# --- Closed forms and measures ---


def lp_closed_form(X: jax.Array, B0: jax.Array, Y: jax.Array) -> jax.Array:
    """LP's limit, least squares on the features XB₀ᵀ; [n, d], [k, d], [n] -> [k].

    Where the features have less than rank k there are many, and this is the shortest.
    """
    return jnp.linalg.lstsq(X @ B0.T, Y)[0]


def lp_error(X: jax.Array, B0: jax.Array, e: jax.Array) -> jax.Array:
    """w_LP - w* = B₀ᵀZ⁺Xe - e with Z = XB₀ᵀ, exactly (derived for this project).

    Args:
      X: [n, d].
      B0: [k, d].
      e: [d], w* - B₀ᵀUv* with U of `feature_distance`: what the features miss.

    Returns:
      [d].
    """
    return B0.T @ lp_closed_form(X, B0, X @ e) - e


def feature_distance(B0: jax.Array, B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """d(B₀, B) = min over rotations U of ‖B₀ - UB‖₂, the spectral norm; and the U [k, k] of Procrustes.

    U v* is the true head as the pretrained features see it.
    """
    P, _, Q = jnp.linalg.svd(B0 @ B.T)
    U = P @ Q
    return jnp.linalg.norm(B0 - U @ B, ord=2), U


def cos_theta_max(A: jax.Array, T: jax.Array) -> jax.Array:
    """The cosine of the largest principal angle between two subspaces; orthonormal bases [d, p], [d, q]."""
    return jnp.linalg.svd(A.T @ T, compute_uv=False).min()


def head_alignment_error(v0: jax.Array, v_aligned: jax.Array) -> jax.Array:
    """φ² = |(v₀ᵀṽ)² - (ṽᵀṽ)²| of a first head and the true one as B₀ sees it; [k], [k] -> scalar.

    Fine-tuning can end without error only where it is 0.
    """
    return jnp.abs(jnp.square(v0 @ v_aligned) - jnp.square(v_aligned @ v_aligned))


def balance(v: jax.Array, B: jax.Array) -> jax.Array:
    """vvᵀ - BBᵀ, which gradient flow of both layers keeps; [k], [k, d] -> [k, k]."""
    return jnp.outer(v, v) - B @ B.T
