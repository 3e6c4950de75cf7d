"""Risk extrapolation: the risks of all environments are to be equal.

David Krueger, Ethan Caballero, Joern-Henrik Jacobsen, Amy Zhang, Jonathan Binas, Dinghuai Zhang, Remi Le
Priol, Aaron Courville. *Out-of-Distribution Generalization via Risk Extrapolation*. ICML 2021 (arXiv
2003.00688). Official code: capybaralet/REx_code_release. DomainBed's V-REx is the default here.

The official Coloured MNIST adds the two risks up (`reduction="sum"`) and penalises (L_1 - L_2)², four times
their variance, or |L_1 - L_2| for MM-REx; like IRM's code it has `l2` in the loss, and divides the whole
loss by p_t where that is above 1 (`rescale`).
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxlab.core import Method, Network
from jaxlab.methods.domain_generalization.environments import Loss, minimize_penalized_risk

Kind = Literal["variance", "pair_square", "pair_abs"]


def vrex_penalty(risks: jax.Array, kind: Kind = "variance") -> jax.Array:
    """How much the risks [E] of the environments differ; a scalar.

    Args:
      risks: [E].
      kind: "variance", (1/E) Σ (L_e - L̄)²; "pair_square", Σ (L_e - L_f)² over all pairs, which is E² times
        as much; "pair_abs", Σ |L_e - L_f| over all pairs, of MM-REx.
    """
    if kind == "variance":
        return jnp.mean(jnp.square(risks - risks.mean()))
    first, second = jnp.triu_indices(len(risks), k=1)
    differences = risks[first] - risks[second]
    if kind == "pair_square":
        return jnp.sum(jnp.square(differences))
    # The gradient of jnp.abs at 0 is 1, which would push equal risks apart.
    return jnp.sum(differences * jnp.sign(differences))


def vrex(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    weight: float = 10.0,
    anneal_steps: int = 500,
    kind: Kind = "variance",
    reduction: Literal["mean", "sum"] = "mean",
    loss: Loss = "softmax",
    l2: float = 0.0,
    rescale: bool = False,
    reset_optimizer: bool = True,
) -> Method:
    """Minimises mean_e L_e + p_t `vrex_penalty`; p_t is 1 first, not 0. The defaults are DomainBed's.

    Args:
      network: a classifier of images.
      optimizer: Adam in both codes.
      weight: p_t from step `anneal_steps` on.
      anneal_steps: how many steps have p_t = 1 first.
      kind: see `vrex_penalty`.
      reduction: "sum" adds the risks up, as the official code.
      loss: "softmax", or "sigmoid" for a network with one logit and labels in {0, 1}.
      l2: of all parameters, biases too, in the loss.
      rescale: whether the whole loss is divided by p_t where that is above 1.
      reset_optimizer: whether the optimizer starts afresh at step `anneal_steps`.
    """
    return minimize_penalized_risk(
        network,
        optimizer,
        lambda outputs, labels, risks: vrex_penalty(risks, kind),
        weight=weight,
        anneal_steps=anneal_steps,
        reset_optimizer=reset_optimizer,
        rescale=rescale,
        l2=l2,
        reduction=reduction,
        loss=loss,
    )
