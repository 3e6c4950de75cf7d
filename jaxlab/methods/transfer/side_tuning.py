"""Side-tuning: a second network learns beside the pretrained one, which stays as it is.

Jeffrey O. Zhang, Alexander Sax, Amir Zamir, Leonidas Guibas, Jitendra Malik. *Side-Tuning: A Baseline for
Network Adaptation via Additive Side Networks*. ECCV 2020 (arXiv 1912.13503). Code: jozhang97/side-tuning.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxlab.core import Method, Network, UserError
from jaxlab.methods.transfer.phases import BatchNormMode, Phase, in_phases
from jaxlab.methods.transfer.trainable import HEAD

Merge = Literal["alpha", "sum"]


def side_merge(base: jax.Array, side: jax.Array, raw_alpha: jax.Array) -> jax.Array:
    """a · base + (1 - a) · side with a = sigmoid(raw_alpha), for features of any one shape."""
    a = jax.nn.sigmoid(raw_alpha)
    return a * base + (1 - a) * side


def with_side(base: Network, side: Network, merge: Merge = "alpha") -> Network:
    """A classifier by the head of `side` on features of both networks.

    Args:
      base: always as in evaluation; its head, if it has one, is not used.
      side: a classifier with the layer `head`, and as many features.
      merge: "alpha", `side_merge` from raw_alpha = 0; "sum", the plain sum of the LP-FT code.

    Returns:
      A network with params {"base": ..., "side": ..., "head": ..., "raw_alpha": scalar}.
    """

    def init(key, inputs):
        base_key, side_key = jax.random.split(key)
        of_base, of_side = base.init(base_key, inputs), side.init(side_key, inputs)
        side_params = dict(of_side["params"])
        if HEAD not in side_params:
            raise UserError("side_tuning: the side network has no layer 'head'; give it num_classes.")
        head = side_params.pop(HEAD)
        params = {"base": of_base["params"], "side": side_params, HEAD: head, "raw_alpha": jnp.zeros(())}
        statistics = {"base": _statistics(of_base), "side": _statistics(of_side)}
        return {"params": params, "batch_stats": statistics}

    def apply(variables, inputs, *, train, key=None):
        params, statistics = variables["params"], variables["batch_stats"]
        base_outputs, _ = base.apply({"params": params["base"], **statistics["base"]}, inputs, train=False)
        of_side = {"params": {**params["side"], HEAD: params[HEAD]}, **statistics["side"]}
        side_outputs, updated = side.apply(of_side, inputs, train=train, key=key)
        pair = base_outputs["features"], side_outputs["features"]
        if pair[0].shape != pair[1].shape:
            raise UserError(
                f"side_tuning: features are {pair[0].shape[1:]} and {pair[1].shape[1:]}; make them equal."
            )
        features = sum(pair) if merge == "sum" else side_merge(*pair, params["raw_alpha"])
        logits = features @ params[HEAD]["kernel"] + params[HEAD]["bias"]
        statistics = {**statistics, "side": _statistics(updated)}
        return {"logits": logits, "features": features}, {**variables, "batch_stats": statistics}

    return Network(init, apply)


def _statistics(variables):
    """All that is not trained."""
    return {name: tree for name, tree in variables.items() if name != "params"}


def side_tuning(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    pretrained_network: Network,
    merge: Merge = "alpha",
    batch_norm: BatchNormMode = "train",
) -> Method:
    """Trains the side network, the head and the merge; see `phases.in_phases` for batches and metrics.

    Args:
      network: the side, a classifier that starts from its `init`.
      optimizer: without weight decay, which would draw the merge to the middle.
      pretrained_network: the base: in a config init_from=dict(pretrained_network="<stage>").
      merge: see `with_side`.
      batch_norm: of the side; the base is always as in evaluation.
    """
    trained = ("side", HEAD, "raw_alpha")
    phase = Phase(optimizer, trainable=trained, batch_norm=batch_norm)
    return in_phases(with_side(pretrained_network, network, merge), (phase,))
