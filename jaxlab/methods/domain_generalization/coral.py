"""Correlation alignment: the features of all environments are to have the same mean and covariance.

Baochen Sun, Kate Saenko. *Deep CORAL: Correlation Alignment for Deep Domain Adaptation*. ECCV 2016 workshops
(arXiv 1607.01719). This is the form of DomainBed (Gulrajani & Lopez-Paz, ICLR 2021) and WILDS, which
matches the means too and takes the mean over all entries where Deep CORAL has ‖ΔC‖² / 4d².
"""

import chex
import jax
import jax.numpy as jnp
import optax

from jaxlab.core import Method, Network
from jaxlab.methods.domain_generalization.environments import (
    Loss,
    minimize_penalized_risk,
    pairwise_mean,
)


def coral_penalty(x: jax.Array, y: jax.Array) -> jax.Array:
    """mean_j (μ_x - μ_y)²_j + mean_jk (C_x - C_y)²_jk, with covariances over n - 1; [n, d], [m, d] -> scalar.

    The covariance of a single row is taken as 0.
    """
    chex.assert_rank([x, y], 2)

    def moments(features: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean = features.mean(0)
        centred = features - mean
        return mean, centred.T @ centred / max(len(features) - 1, 1)

    (mean_x, covariance_x), (mean_y, covariance_y) = moments(x), moments(y)
    return jnp.mean(jnp.square(mean_x - mean_y)) + jnp.mean(jnp.square(covariance_x - covariance_y))


def coral(
    network: Network, optimizer: optax.GradientTransformation, *, weight: float = 1.0, loss: Loss = "softmax"
) -> Method:
    """Minimises mean_e L_e + weight · the mean of `coral_penalty` over all pairs of environments.

    Args:
      network: a classifier of images, whose "features" are aligned; each environment passes on its own.
      optimizer: what turns the gradient into a move.
      weight: γ; 1 in DomainBed.
      loss: "softmax", or "sigmoid" for a network with one logit and labels in {0, 1}.
    """
    return minimize_penalized_risk(
        network,
        optimizer,
        lambda outputs, labels, risks: pairwise_mean(coral_penalty, outputs["features"]),
        weight=weight,
        loss=loss,
        separately=True,
    )
