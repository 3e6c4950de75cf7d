"""The convolutional network for digits of DomainBed (Gulrajani & Lopez-Paz, ICLR 2021, `MNIST_CNN`)."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlab.core import Network, Outputs
from jaxlab.nn.layers import FAN_IN_UNIFORM, classify, symmetric_uniform
from jaxlab.nn.linen import from_linen

_CHANNELS, _STRIDES = (64, 128, 128, 128), (1, 2, 1, 1)


class MNISTCNN(nn.Module):
    """See `mnist_cnn`."""

    num_classes: int | None

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool) -> Outputs:
        del train
        chex.assert_rank(inputs, 4)
        x = inputs.astype(jnp.float32)
        for i, (features, stride) in enumerate(zip(_CHANNELS, _STRIDES), start=1):
            conv = nn.Conv(
                features,
                (3, 3),
                strides=stride,
                padding=1,
                kernel_init=FAN_IN_UNIFORM,
                bias_init=symmetric_uniform((9 * x.shape[-1]) ** -0.5),
                name=f"conv{i}",
            )
            x = nn.GroupNorm(num_groups=8, epsilon=1e-5, name=f"norm{i}")(jax.nn.relu(conv(x)))
        return classify(x.mean((1, 2)), self.num_classes)


def mnist_cnn(num_classes: int | None) -> Network:
    """Four 3×3 convolutions of 64, 128, 128 and 128 channels, then the global mean, on images [B, H, W, C].

    The second has stride 2. Each is followed by ReLU and then group normalisation with 8 groups, so that no
    statistics pass between environments. Initialised as PyTorch does by default.

    Args:
      num_classes: K, the number of logits; None: an encoder, which has no head and gives features only.
    """
    return from_linen(MNISTCNN(num_classes))
