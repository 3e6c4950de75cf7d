"""The two-layer model measured: errors against the quality of the head and of the features.

All problems of a run, over seeds, features and heads, are one vmapped program in float64. See `two_layer.py`
for the model and its reference.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxlab.core import Batch, Evaluator, Method, Outputs, State, Stream, UserError, Variables
from jaxlab.methods.transfer.two_layer import (
    gradient_flow_step,
    id_and_ood_error,
    lp_closed_form,
    make_two_layer_problem,
    two_layer_loss,
)

Results = Mapping[str, Mapping[str, Any]]
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe-Ito


def simulate(
    key: chex.PRNGKey,
    *,
    distances: tuple[float, ...],
    alphas: tuple[float, ...],
    head_stds: tuple[float, ...],
    d: int = 30,
    m: int = 15,
    k: int = 3,
    n: int = 40,
    learning_rate: float = 0.02,
    num_steps: int = 4000,
) -> dict[str, jax.Array]:
    """LP and FT of one problem from features and heads of several qualities, in float64.

    Args:
      key: the same true features, inputs and random heads for all qualities.
      distances: d(B₀, B*) = ε of each of E pretrained features.
      alphas: of each of A heads that FT starts from, (1 - α) v_random + α v_LP; 1 is LP-FT.
      head_stds: σ of v_random ~ N(0, σ²I), H of them, the same draw scaled.
      d, m, k, n: see `make_two_layer_problem`.
      learning_rate: of gradient descent.
      num_steps: T.

    Returns:
      `lp_error` [E, 2], in and out of distribution; of FT [H, A, E]: `ft_error` [..., 2], `ft_loss`, the
      training loss at the end, and `ft_movement` [..., 2], the root mean square of ‖(B_T - B₀)x‖ in and out
      of distribution over that of ‖x‖. float32.
    """

    def of_features(eps: jax.Array, alpha: jax.Array, std: jax.Array) -> dict[str, jax.Array]:
        problem_key, head_key = jax.random.split(key)
        p = make_two_layer_problem(problem_key, d, m, k, n, eps)
        v_lp = lp_closed_form(p.X, p.B0, p.Y)
        v_random = std * jax.random.normal(head_key, (k,), jnp.float32).astype(v_lp.dtype)

        def step(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
            return gradient_flow_step(*carry, p.X, p.Y, learning_rate), None

        (v, B), _ = jax.lax.scan(step, ((1 - alpha) * v_random + alpha * v_lp, p.B0), length=num_steps)
        moved = B - p.B0
        return {
            "lp_error": jnp.stack(id_and_ood_error(p.B0.T @ v_lp, p.w_star, p.F)),
            "ft_error": jnp.stack(id_and_ood_error(B.T @ v, p.w_star, p.F)),
            "ft_loss": two_layer_loss(v, B, p.X, p.Y),
            "ft_movement": jnp.stack(
                [jnp.linalg.norm(moved @ p.F) / np.sqrt(m), jnp.linalg.norm(moved) / np.sqrt(d)]
            ),
        }

    with jax.enable_x64(True):
        over_features = jax.vmap(of_features, (0, None, None))
        over_heads = jax.vmap(jax.vmap(over_features, (None, 0, None)), (None, None, 0))
        results = over_heads(*(jnp.asarray(x, jnp.float64) for x in (distances, alphas, head_stds)))
        results["lp_error"] = results["lp_error"][0, 0]  # whatever head FT starts from
        return {name: x.astype(jnp.float32) for name, x in results.items()}


class TheoryState(NamedTuple):
    """`variables["params"]` holds what `simulate` returns; zeros before the one update there is."""

    variables: Variables


def theory(
    *,
    distances: tuple[float, ...],
    alphas: tuple[float, ...],
    head_stds: tuple[float, ...] = (1.0,),
    d: int = 30,
    m: int = 15,
    k: int = 3,
    n: int = 40,
    learning_rate: float = 0.02,
    num_steps: int = 4000,
) -> Method:
    """Makes a problem from the key of its update and trains on it to the end, see `simulate`.

    One update is all: config.steps=1, and any stream, such as `theory.no_data`. Metrics: `loss`, the largest
    training loss that is left.

    Raises:
      UserError: no features, no heads, or not the two heads that stand for FT and LP-FT.
    """
    if not distances or not head_stds or not {0.0, 1.0} <= set(alphas):
        raise UserError(
            "theory: give distances, head_stds, and alphas with 0.0 (FT) and 1.0 (LP-FT) among them."
        )

    def run(key: chex.PRNGKey) -> dict[str, jax.Array]:
        return simulate(
            key,
            distances=distances,
            alphas=alphas,
            head_stds=head_stds,
            d=d,
            m=m,
            k=k,
            n=n,
            learning_rate=learning_rate,
            num_steps=num_steps,
        )

    def init(key: chex.PRNGKey, batch: Batch) -> TheoryState:
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, key))
        return TheoryState({"params": empty})

    def update(
        state: TheoryState, batch: Batch, key: chex.PRNGKey
    ) -> tuple[TheoryState, dict[str, jax.Array]]:
        results = run(key)
        return TheoryState({"params": results}), {"loss": jnp.max(results["ft_loss"])}

    return Method(init, update, lambda state, batch: state.variables["params"])


def no_data(*, batch_size: int) -> Stream:
    """Batches of nothing but their length, for methods that make their own data."""
    return Stream(lambda step, key: {"index": jnp.arange(batch_size)}, on_device=True)


def errors(
    *, distances: tuple[float, ...], alphas: tuple[float, ...], head_stds: tuple[float, ...] = (1.0,)
) -> Evaluator:
    """What `theory` found, by the distance of the features.

    Args:
      distances, alphas, head_stds: those of the method.

    Returns:
      An evaluator of, for each distance, `distance_<ε>/...`: `lp_ood_error`, `lp_id_error`; of FT from
      a random head of the first σ `ft_ood_error` and `ft_id_error`; `lp_ft_ood_error` and `lp_ft_id_error`;
      `small_head_ft_ood_error` of the last σ, where there are several. Its plots are drawn from the curves
      `curve/...`: errors out of distribution over alphas, of each σ and ε, and over distances.
    """

    def evaluate(predict: Callable[[State, Batch], Outputs], state: State) -> dict[str, Any]:
        found = {name: np.asarray(x) for name, x in state.variables["params"].items()}
        lp, ft, moved = found["lp_error"], found["ft_error"], found["ft_movement"]
        fresh, probed = alphas.index(0.0), alphas.index(1.0)
        metrics: dict[str, Any] = {}
        for i, distance in enumerate(distances):
            row = f"distance_{distance:g}"
            by_method = {"lp": lp[i], "ft": ft[0, fresh, i], "lp_ft": ft[0, probed, i]}
            for method, (id_error, ood_error) in by_method.items():
                metrics[f"{row}/{method}_ood_error"] = ood_error
                metrics[f"{row}/{method}_id_error"] = id_error
            if len(head_stds) > 1:
                metrics[f"{row}/small_head_ft_ood_error"] = ft[-1, fresh, i, 1]
            for method, j in (("ft", fresh), ("lp_ft", probed)):
                metrics[f"curve/movement/{method}_{distance:g}"] = moved[0, j, i]
            metrics[f"curve/heads/{distance:g}"] = ft[0, :, i, 1]
        metrics["curve/features/lp"] = lp[:, 1]
        metrics["curve/features/lp_ft"] = ft[0, probed, :, 1]
        for h, std in enumerate(head_stds):
            metrics[f"curve/features/ft_{std:g}"] = ft[h, fresh, :, 1]
        return metrics

    def plot(results: Results) -> dict[str, Figure]:
        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        by_head, by_features = figure.subplots(1, 2)
        for i, distance in enumerate(distances):
            label = rf"$\varepsilon$ = {distance:g}"
            _band(by_head, alphas, results[f"curve/heads/{distance:g}"], i, label)
        by_head.set(xlabel=r"quality of the head, $\alpha$ (0 random, 1 LP-FT)", ylabel="OOD error of FT")
        lines = {"lp": "LP", "lp_ft": "LP-FT"}
        lines |= {f"ft_{std:g}": rf"FT, head of $\sigma$ = {std:g}" for std in head_stds}
        for i, (name, label) in enumerate(lines.items()):
            _band(by_features, distances, results[f"curve/features/{name}"], i, label)
        by_features.set(xlabel=r"distance of the features, $\varepsilon = d(B_0, B^*)$", ylabel="OOD error")
        for axes in (by_head, by_features):
            axes.set_yscale("symlog", linthresh=1e-3)
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#d8dee9", linewidth=0.6)
            axes.legend(frameon=False, fontsize=8)
        return {"ood_error": figure}

    return Evaluator(evaluate, plot)


def _band(axes: Axes, x: tuple[float, ...], result: Mapping[str, Any], index: int, label: str) -> None:
    """A line with its standard error over seeds."""
    mean, stderr = np.asarray(result["mean"]), np.nan_to_num(result["stderr"])
    colour = _COLOURS[index % len(_COLOURS)]
    axes.plot(x, mean, color=colour, marker="o", markersize=3, label=label)
    axes.fill_between(x, mean - stderr, mean + stderr, color=colour, alpha=0.25, linewidth=0)
