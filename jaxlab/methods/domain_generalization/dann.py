"""Domain-adversarial networks: no discriminator is to tell from the features which environment they are of.

Yaroslav Ganin, Evgeniya Ustinova, Hana Ajakan, Pascal Germain, Hugo Larochelle, François Laviolette, Mario
Marchand, Victor Lempitsky. *Domain-Adversarial Training of Neural Networks*. JMLR 2016; conditional (CDANN):
Li et al., ECCV 2018. This is the form of DomainBed (Gulrajani & Lopez-Paz, ICLR 2021): discriminator and
network take turns, there is no gradient reversal and no ramp.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jaxlab.core import Batch, Method, Network, UserError, Variables
from jaxlab.core.updates import apply_gradient
from jaxlab.methods.domain_generalization.environments import (
    Loss,
    accuracy,
    apply_to_environments,
    environment_risks,
    init_network,
    merge,
    predict,
)
from jaxlab.metrics.classification import correct, negative_log_likelihood


def dann_losses(
    features: jax.Array,
    env_ids: jax.Array,
    disc_apply: Callable[[Any, jax.Array], jax.Array],
    disc_params: Any,
    grad_penalty: float,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The discriminator's loss: cross entropy + grad_penalty · mean_i ‖∂CE_i/∂z_i‖².

    Args:
      features: z [B, F], what the discriminator sees.
      env_ids: [B] integers.
      disc_apply: `disc_apply(disc_params, features) -> logits` [B, E], each row from its own features.
      disc_params: its parameters.
      grad_penalty: of the gradient penalty, which is of second order.
      weights: [B], each example's weight in a sum that takes the place of the mean; of CDANN.

    Returns:
      The loss and {"cross_entropy", "gradient_penalty", "accuracy"}: its parts without their factors, and
      the share of examples whose environment is told.
    """

    def losses(features: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = disc_apply(disc_params, features)
        each = negative_log_likelihood(logits, env_ids)
        return each.sum(), (each, logits)

    gradient, (each, logits) = jax.grad(losses, has_aux=True)(features)
    cross_entropy = each.mean() if weights is None else jnp.sum(weights * each)
    penalty = jnp.mean(jnp.sum(jnp.square(gradient), axis=1))
    parts = {
        "cross_entropy": cross_entropy,
        "gradient_penalty": penalty,
        "accuracy": jnp.mean(correct(logits, env_ids)),
    }
    return cross_entropy + grad_penalty * penalty, parts


def is_discriminator_step(step: jax.Array | int, d_steps: int) -> jax.Array | bool:
    """Whether step `step` (from 0) trains the discriminator: (step + 1) mod (1 + d_steps) < d_steps."""
    return (step + 1) % (1 + d_steps) < d_steps


def dann_schedule(step: int, d_steps: int) -> Literal["disc", "gen"]:
    """What step `step` (from 0) trains; with d_steps = 1 the first one trains the network."""
    return "disc" if is_discriminator_step(step, d_steps) else "gen"


class DANNState(NamedTuple):
    """Variables and optimizer state of the network, and of the discriminator, and the updates made.

    `discriminator` is {"network": variables, "embedding": [K, F]}, the last for CDANN only.
    """

    variables: Variables
    opt_state: optax.OptState
    discriminator: dict[str, Any]
    discriminator_opt_state: optax.OptState
    step: jax.Array


def dann(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    discriminator_network: Network,
    discriminator_optimizer: optax.GradientTransformation,
    weight: float = 1.0,
    d_steps: int = 1,
    grad_penalty: float = 0.0,
    conditional: bool = False,
    loss: Loss = "softmax",
) -> Method:
    """Alternates: d_steps of the discriminator on its loss, one of the network on risk - weight · that loss.

    What the discriminator is to tell is an example's `context` [E, n], or its environment where a batch has
    none. Metrics of every step, whatever it trains: `loss`, mean_e L_e; `accuracy`; `discriminator_loss`, its
    cross entropy, and `discriminator_accuracy`.

    Args:
      network: a classifier of images, whose "features" the discriminator sees.
      optimizer: of the network; in DomainBed Adam with b1 = 0.5, b2 = 0.9.
      discriminator_network: from features [B, F] to a logit for each context; in DomainBed an MLP of width
        256 and depth 3. Its variables must be parameters only.
      discriminator_optimizer: likewise Adam.
      weight: λ.
      d_steps: steps of the discriminator between two of the network.
      grad_penalty: see `dann_losses`.
      conditional: CDANN: the discriminator sees z + an embedding of the label, learned with it, and each
        class counts alike in its cross entropy.
      loss: "softmax", or "sigmoid" for a network with one logit and labels in {0, 1}.
    """

    if d_steps < 1:
        raise UserError(f"d_steps: expected 1 or more, got {d_steps}.")

    def init(key: chex.PRNGKey, batch: Batch) -> DANNState:
        network_key, discriminator_key, embedding_key = jax.random.split(key, 3)
        variables = init_network(network, network_key, batch)
        outputs = jax.eval_shape(lambda: predict(network, variables, {"image": merge(batch["image"])}))
        width, num_classes = outputs["features"].shape[-1], outputs["logits"].shape[-1]
        discriminator = {
            "network": discriminator_network.init(discriminator_key, jnp.zeros((1, width)))["params"]
        }
        if conditional:
            discriminator["embedding"] = jax.random.normal(embedding_key, (num_classes, width))
        return DANNState(
            variables,
            optimizer.init(variables["params"]),
            discriminator,
            discriminator_optimizer.init(discriminator),
            jnp.zeros((), jnp.int32),
        )

    def update(state: DANNState, batch: Batch, key: chex.PRNGKey) -> tuple[DANNState, dict[str, jax.Array]]:
        labels, (network_key, discriminator_key) = batch["label"], jax.random.split(key)
        positions = jnp.broadcast_to(jnp.arange(len(labels))[:, None], labels.shape)
        env_ids = merge(batch.get("context", positions))

        def discriminate(params: Any, features: jax.Array) -> jax.Array:
            outputs, _ = discriminator_network.apply(
                {"params": params}, features, train=True, key=discriminator_key
            )
            return outputs["logits"]

        def discriminator_loss(
            discriminator: dict[str, Any], features: jax.Array
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            weights = None
            if conditional:
                y, embedding = merge(labels), discriminator["embedding"]
                counts = jnp.zeros(len(embedding), features.dtype).at[y].add(1)
                weights = 1 / (counts[y] * len(embedding))
                features = features + embedding[y]
            return dann_losses(
                features, env_ids, discriminate, discriminator["network"], grad_penalty, weights
            )

        def objective(params: chex.ArrayTree) -> tuple[jax.Array, tuple]:
            variables = {**state.variables, "params": params}
            outputs, variables = apply_to_environments(network, variables, batch["image"], key=network_key)
            risk = environment_risks(outputs["logits"], labels, loss=loss).mean()
            features = merge(outputs["features"])
            adversary, parts = discriminator_loss(state.discriminator, features)
            metrics = {
                "loss": risk,
                "accuracy": accuracy(outputs, labels),
                "discriminator_loss": parts["cross_entropy"],
                "discriminator_accuracy": parts["accuracy"],
            }
            return risk - weight * adversary, (variables, features, metrics)

        def train_discriminator() -> tuple[DANNState, dict[str, jax.Array]]:
            _, (variables, features, metrics) = objective(state.variables["params"])
            gradient, _ = jax.grad(discriminator_loss, has_aux=True)(state.discriminator, features)
            moves, opt_state = discriminator_optimizer.update(
                gradient, state.discriminator_opt_state, state.discriminator
            )
            return state._replace(
                variables=variables,
                discriminator=optax.apply_updates(state.discriminator, moves),
                discriminator_opt_state=opt_state,
                step=state.step + 1,
            ), metrics

        def train_network() -> tuple[DANNState, dict[str, jax.Array]]:
            gradient, (variables, _, metrics) = jax.grad(objective, has_aux=True)(state.variables["params"])
            variables = {**variables, "params": state.variables["params"]}
            variables, opt_state = apply_gradient(optimizer, gradient, variables, state.opt_state)
            return state._replace(variables=variables, opt_state=opt_state, step=state.step + 1), metrics

        return jax.lax.cond(is_discriminator_step(state.step, d_steps), train_discriminator, train_network)

    return Method(init, update, lambda state, batch: predict(network, state.variables, batch))
