"""Empirical risk minimisation over environments, the baseline that its peers must beat.

Vapnik, *Principles of Risk Minimization for Learning Theory*, NeurIPS 1991. Without `l2` it is ERM of
DomainBed (Gulrajani & Lopez-Paz, ICLR 2021); with it, and the sigmoid loss, that of the IRM code.
"""

import jax.numpy as jnp
import optax

from jaxlab.core import Method, Network
from jaxlab.methods.domain_generalization.environments import Loss, minimize_penalized_risk


def erm(
    network: Network, optimizer: optax.GradientTransformation, *, l2: float = 0.0, loss: Loss = "softmax"
) -> Method:
    """Minimises mean_e L_e + l2 Σ‖w‖² on batches {"image": [E, n, ...], "label": [E, n]}.

    Args:
      network: a classifier of images.
      optimizer: in DomainBed Adam.
      l2: of all parameters, biases too.
      loss: "softmax", or "sigmoid" for a network with one logit and labels in {0, 1}.
    """
    return minimize_penalized_risk(
        network, optimizer, lambda outputs, labels, risks: jnp.zeros(()), weight=0.0, l2=l2, loss=loss
    )
