"""Invariant risk minimisation (IRMv1): one classifier is to be the best in every environment at once.

Martin Arjovsky, Léon Bottou, Ishaan Gulrajani, David Lopez-Paz. *Invariant Risk Minimization*. 2019 (arXiv
1907.02893). Official code: facebookresearch/InvariantRiskMinimization. Its form for minibatches is that of
Gulrajani & Lopez-Paz, ICLR 2021 (facebookresearch/DomainBed), which WILDS has too.

The scalar w = 1 stands for the classifier on top of the logits l. Its gradient in an environment,
G_e = ∂/∂w L_e(w · l) at w = 1, has a closed form, so no derivative is taken inside another here.

| | official Coloured MNIST | DomainBed |
|---|---|---|
| batch | all of both environments | n of each |
| penalty | G_e² (`square`) | G of even rows times G of odd ones (`split_half`), which may be negative |
| loss | sigmoid, `l2` in the loss | softmax |
| where p_t > 1 | the loss is divided by p_t (`rescale`) | is not |
| at the end of annealing | nothing | a fresh optimizer (`reset_optimizer`) |
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxlab.core import Method, Network, UserError
from jaxlab.methods.domain_generalization.environments import Loss, minimize_penalized_risk, one_logit

Estimator = Literal["square", "split_half"]


def irm_penalty(
    logits: jax.Array, labels: jax.Array, estimator: Estimator = "split_half", loss: Loss = "softmax"
) -> jax.Array:
    """The squared gradient of each environment's risk with respect to the scalar classifier.

    G = mean_i Σ_k (p_ik - 1[k = y_i]) l_ik for the softmax, mean_i (σ(l_i) - y_i) l_i for the sigmoid loss.

    Args:
      logits: [E, n, K]; of the sigmoid loss [E, n, 1] or [E, n].
      labels: [E, n].
      estimator: "square", G² of all rows, which a minibatch's variance inflates; "split_half", the product
        of G of rows 0, 2, 4, ... and of rows 1, 3, 5, ..., which has no such bias.
      loss: "softmax" or "sigmoid".

    Returns:
      [E].

    Raises:
      UserError: one row has no halves.
    """
    if loss == "sigmoid":
        logits, targets = one_logit(logits, labels)
        gradients = (jax.nn.sigmoid(logits) - targets) * logits
    else:
        targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        gradients = jnp.sum((jax.nn.softmax(logits) - targets) * logits, axis=-1)
    if estimator == "square":
        return jnp.square(gradients.mean(1))
    if gradients.shape[1] < 2:
        raise UserError("irm: estimator 'split_half' needs two examples of an environment or more.")
    return gradients[:, 0::2].mean(1) * gradients[:, 1::2].mean(1)


def irm(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    weight: float = 100.0,
    anneal_steps: int = 500,
    estimator: Estimator = "split_half",
    loss: Loss = "softmax",
    l2: float = 0.0,
    rescale: bool = False,
    reset_optimizer: bool = True,
) -> Method:
    """Minimises mean_e L_e + p_t mean_e penalty_e; p_t is 1 first, not 0. The defaults are DomainBed's.

    Args:
      network: a classifier of images.
      optimizer: Adam in both codes.
      weight: p_t from step `anneal_steps` on.
      anneal_steps: how many steps have p_t = 1 first.
      estimator: see `irm_penalty`.
      loss: "softmax", or "sigmoid" for a network with one logit and labels in {0, 1}.
      l2: of all parameters, biases too, in the loss.
      rescale: whether the whole loss is divided by p_t where that is above 1.
      reset_optimizer: whether the optimizer starts afresh at step `anneal_steps`.
    """
    return minimize_penalized_risk(
        network,
        optimizer,
        lambda outputs, labels, risks: irm_penalty(outputs["logits"], labels, estimator, loss).mean(),
        weight=weight,
        anneal_steps=anneal_steps,
        reset_optimizer=reset_optimizer,
        rescale=rescale,
        l2=l2,
        loss=loss,
    )
