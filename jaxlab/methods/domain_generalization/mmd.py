"""Maximum mean discrepancy: the features of all environments are to have the same distribution.

Haoliang Li, Sinno Jialin Pan, Shiqi Wang, Alex C. Kot. *Domain Generalization with Adversarial Feature
Learning*. CVPR 2018; the discrepancy: Gretton et al., JMLR 2012. This is the form of DomainBed (Gulrajani &
Lopez-Paz, ICLR 2021), a sum of Gaussian kernels and no adversary.
"""

from collections.abc import Sequence

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

GAMMAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)


def mmd_penalty(x: jax.Array, y: jax.Array, gammas: Sequence[float] = GAMMAS) -> jax.Array:
    """mean k(x, x') + mean k(y, y') - 2 mean k(x, y), k = Σ_γ exp(-γ ‖x - y‖²); [n, d], [m, d] -> scalar.

    The means are over all pairs of rows, a row with itself too (the V-statistic). Squared distances come from
    ‖x‖² + ‖y‖² - 2 x·y and are at least 1e-30, as rounding may make them negative.
    """
    chex.assert_rank([x, y], 2)

    def kernel_mean(x: jax.Array, y: jax.Array) -> jax.Array:
        squares = jnp.sum(x**2, axis=1)[:, None] + jnp.sum(y**2, axis=1)
        distances = jnp.maximum(squares - 2 * jnp.matmul(x, y.T, precision="highest"), 1e-30)
        return jnp.mean(sum(jnp.exp(-gamma * distances) for gamma in gammas))

    return kernel_mean(x, x) + kernel_mean(y, y) - 2 * kernel_mean(x, y)


def mmd(
    network: Network, optimizer: optax.GradientTransformation, *, weight: float = 1.0, loss: Loss = "softmax"
) -> Method:
    """Minimises mean_e L_e + weight · the mean of `mmd_penalty` over all pairs of environments.

    Args:
      network: a classifier of images, whose "features" are aligned; each environment passes on its own.
      optimizer: what turns the gradient into a move.
      weight: γ of DomainBed, where it is 1.
      loss: "softmax", or "sigmoid" for a network with one logit and labels in {0, 1}.
    """
    return minimize_penalized_risk(
        network,
        optimizer,
        lambda outputs, labels, risks: pairwise_mean(mmd_penalty, outputs["features"]),
        weight=weight,
        loss=loss,
        separately=True,
    )
