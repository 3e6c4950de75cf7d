"""LP-FT: linear probing, then fine-tuning from its head.

Ananya Kumar, Aditi Raghunathan, Robbie Jones, Tengyu Ma, Percy Liang. *Fine-Tuning can Distort Pretrained
Features and Underperform Out-of-Distribution*. ICLR 2022 (arXiv 2202.10054). Official code:
AnanyaKumar/transfer_learning.
"""

import optax

from jaxlab.core import Method, Network, UserError
from jaxlab.methods.transfer.phases import Phase, in_phases
from jaxlab.methods.transfer.trainable import HEAD


def lp_ft(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    probe_optimizer: optax.GradientTransformation,
    probe_steps: int,
    steps: int,
    pretrained_network: Network | None = None,
) -> Method:
    """LP-FT in two phases: LP by gradient descent, then FT from its head, both with frozen statistics.

    From the exact probe it is a stage of `fine_tune.fine_tune` with batch_norm="eval" behind one of
    `linear_probe.exact`.

    Args:
      network, pretrained_network: see `phases.in_phases`.
      optimizer: of FT.
      probe_optimizer: of LP.
      probe_steps: of LP.
      steps: of both together.

    Raises:
      UserError: nothing is left for one of the phases.
    """
    if not 0 < probe_steps < steps:
        raise UserError(f"probe_steps: expected 1 to {steps - 1}, fewer than all steps, got {probe_steps}.")
    phases = Phase(probe_optimizer, probe_steps, trainable=HEAD), Phase(optimizer)
    return in_phases(network, phases, pretrained_network=pretrained_network)


def epoch_cosine(init_value: float, *, epoch_steps: int, epochs: int) -> optax.Schedule:
    """½ η (1 + cos(π e / E)), constant within epoch e, as the official code has it.

    Args:
      init_value: η.
      epoch_steps: updates of an epoch.
      epochs: E.
    """
    cosine = optax.cosine_decay_schedule(init_value, epochs)
    return lambda step: cosine(step // epoch_steps)
