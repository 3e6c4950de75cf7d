"""Several networks of one kind as one."""

import jax
import jax.numpy as jnp

from jaxlab.core import Network, UserError


def ensemble(network: Network, *, size: int) -> Network:
    """`size` networks that start from different keys, see the same inputs and share nothing.

    Args:
      network: of each member, a classifier.
      size: M, the number of members.

    Returns:
      A network whose variables have a leading axis [M]. Its outputs are `member_logits` [B, M, K], `logits`
      [B, K], the logarithms of the members' mean probabilities, and `features` [B, M · F].

    Raises:
      UserError: `size` is below 1.
    """
    if size < 1:
        raise UserError(f"size: expected 1 or more members, got {size}.")

    def init(key, inputs):
        return jax.vmap(network.init, (0, None))(jax.random.split(key, size), inputs)

    def apply(variables, inputs, *, train, key=None):
        def member(variables, key):
            return network.apply(variables, inputs, train=train, key=key)

        keys = None if key is None else jax.random.split(key, size)
        outputs, updated = jax.vmap(member, (0, None if key is None else 0))(variables, keys)
        member_logits = jnp.moveaxis(outputs["logits"], 0, 1)
        log_probabilities = jax.nn.log_softmax(member_logits)
        features = jnp.moveaxis(outputs["features"], 0, 1)
        return {
            "logits": jax.nn.logsumexp(log_probabilities, axis=1) - jnp.log(size),
            "features": features.reshape(len(features), -1),
            "member_logits": member_logits,
        }, updated

    return Network(init, apply)
