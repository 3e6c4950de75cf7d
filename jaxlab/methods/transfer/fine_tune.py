"""Full fine-tuning (FT), and surgical fine-tuning, of which it is the case of all layers."""

import optax

from jaxlab.core import Method, Network
from jaxlab.methods.transfer.phases import BatchNormMode, Phase, in_phases


def fine_tune(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    pretrained_network: Network | None = None,
    trainable: str | tuple = "all",
    batch_norm: BatchNormMode = "train",
) -> Method:
    """FT, one phase; see `phases.in_phases`.

    With names of layers it is surgical fine-tuning (Lee et al., ICLR 2023), which starts from a trained head.

    Args:
      network, pretrained_network: see `phases.in_phases`.
      optimizer: SGD with momentum 0.9, without weight decay, on `lp_ft.epoch_cosine` in the official code.
      trainable: which parameters are trained, see `trainable.trainable_mask`.
      batch_norm: see `phases.Phase`.
    """
    phase = Phase(optimizer, trainable=trainable, batch_norm=batch_norm)
    return in_phases(network, (phase,), pretrained_network=pretrained_network)
