"""Mixup between environments: trains on convex combinations of examples of two of them.

Hongyi Zhang, Moustapha Cisse, Yann Dauphin, David Lopez-Paz. *mixup: Beyond Empirical Risk Minimization*.
ICLR 2018 (arXiv 1710.09412); between domains as in DomainBed (Gulrajani & Lopez-Paz, ICLR 2021), after Yan
et al. (arXiv 2001.00677) and Xu et al. (AAAI 2020).
"""

import chex
import jax
import jax.numpy as jnp
import optax

from jaxlab.core import Batch, Method, Network, UserError, Variables
from jaxlab.core.updates import TrainState, gradient_update
from jaxlab.methods.domain_generalization.environments import (
    Loss,
    accuracy,
    apply_to_environments,
    environment_risks,
    init_network,
    predict,
)


def interdomain_mixup(
    rng: chex.PRNGKey, images: jax.Array, labels: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Mixes each environment, in a random order, with the next one; the last with the first.

    Args:
      rng: draws the order and, for each pair, λ ~ Beta(alpha, alpha).
      images: [E, n, ...], floating.
      labels: [E, n].
      alpha: of the Beta distribution, above 0.

    Returns:
      λ · first + (1 - λ) · second [E, n, ...], the labels of the first and of the second [E, n], and λ [E].
    """
    order_key, lam_key = jax.random.split(rng)
    first = jax.random.permutation(order_key, len(images))
    second = jnp.roll(first, -1)
    lam = jax.random.beta(lam_key, alpha, alpha, (len(images),), images.dtype)
    share = lam.reshape(-1, *[1] * (images.ndim - 1))
    return share * images[first] + (1 - share) * images[second], labels[first], labels[second], lam


def mixup(
    network: Network, optimizer: optax.GradientTransformation, *, alpha: float = 0.2, loss: Loss = "softmax"
) -> Method:
    """Minimises (1/E) Σ_pairs λ CE(·, first label) + (1 - λ) CE(·, second label), on mixed images.

    Metrics: `loss`; `accuracy` on the mixed images, with the label that has the larger share.

    Args:
      network: a classifier of images; each pair passes on its own, as in DomainBed.
      optimizer: what turns the gradient into a move.
      alpha: of Beta(alpha, alpha); 0.2 in DomainBed.
      loss: "softmax", or "sigmoid" for a network with one logit and labels in {0, 1}.
    """

    if alpha <= 0:
        raise UserError(f"alpha: expected a number above 0, got {alpha}.")

    def init(key: chex.PRNGKey, batch: Batch) -> TrainState:
        variables = init_network(network, key, batch)
        return TrainState(variables, optimizer.init(variables["params"]))

    def update(state: TrainState, batch: Batch, key: chex.PRNGKey) -> tuple[TrainState, dict[str, jax.Array]]:
        mixup_key, key = jax.random.split(key)
        images, labels_a, labels_b, lam = interdomain_mixup(mixup_key, batch["image"], batch["label"], alpha)

        def objective(variables: Variables) -> tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]:
            outputs, variables = apply_to_environments(network, variables, images, key=key, separately=True)
            risks_a = environment_risks(outputs["logits"], labels_a, loss=loss)
            risks_b = environment_risks(outputs["logits"], labels_b, loss=loss)
            labels = jnp.where(lam[:, None] >= 0.5, labels_a, labels_b)
            value = jnp.mean(lam * risks_a + (1 - lam) * risks_b)
            return value, (variables, {"accuracy": accuracy(outputs, labels)})

        variables, opt_state, metrics = gradient_update(objective, optimizer, *state)
        return TrainState(variables, opt_state), metrics

    return Method(init, update, lambda state, batch: predict(network, state.variables, batch))
