"""Pre-activation residual networks for small images (He et al., "Identity Mappings", arXiv 1603.05027).

Their blocks are those of wide ResNets without dropout; channels and depths are those of `jaxlab.nn.resnet`.
"""

from typing import Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlab.core import Network, Outputs
from jaxlab.nn import activations
from jaxlab.nn.activations import Activation
from jaxlab.nn.layers import HE_NORMAL_FAN_OUT, classify
from jaxlab.nn.linen import from_linen
from jaxlab.nn.normalization import NormActivation, Order, needs_bias
from jaxlab.nn.resnet import LAYOUTS, Layout
from jaxlab.nn.wide_resnet import WideBlock


class PreActResNet(nn.Module):
    """See `preact_resnet`; `depth` may be any layout, whose shortcuts always project."""

    depth: int | Layout
    num_classes: int | None
    order: Order = "convention"
    activation: str | Activation = "relu"
    use_bias: bool | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool) -> Outputs:
        chex.assert_rank(inputs, 4)
        layout = self.depth if isinstance(self.depth, Layout) else LAYOUTS[self.depth]
        activation = activations.get(self.activation)
        use_bias = needs_bias(self.use_bias, self.order)
        stem = nn.Conv(
            layout.channels[0],
            (3, 3),
            padding=1,
            use_bias=use_bias,
            dtype=self.dtype,
            kernel_init=HE_NORMAL_FAN_OUT,
            name="stem",
        )
        x = stem(inputs.astype(self.dtype))
        for group, (features, blocks) in enumerate(zip(layout.channels, layout.blocks), start=1):
            for block in range(1, blocks + 1):
                x = WideBlock(
                    features=features,
                    stride=2 if group > 1 and block == 1 else 1,
                    dropout_rate=0.0,
                    order=self.order,
                    activation=activation,
                    use_bias=use_bias,
                    dtype=self.dtype,
                    name=f"group{group}_block{block}",
                )(x, train=train)
        x = NormActivation(activation=activation, order=self.order, name="norm")(x, train=train)
        return classify(x.mean((1, 2), dtype=jnp.float32), self.num_classes)


def preact_resnet(
    num_classes: int | None,
    *,
    depth: Literal[18, 34],
    order: Order = "convention",
    activation: str | Activation = "relu",
    use_bias: bool | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """A pre-activation ResNet on images [B, H, W, C]; convolutions have symmetric padding.

    Args:
      num_classes: K, the number of logits; None: an encoder, which has no head and gives features only.
      depth: 64 to 512 channels in groups of 2, 2, 2, 2 or 3, 4, 6, 3 blocks. Where the shape changes, the
        shortcut projects the activated input.
      order: "convention": norm, activation, convolution, twice in a block; "swap": activation, norm,
        convolution; and likewise for the pair in front of the pooling.
      activation: one of `jaxlab.nn.activations`, or its name.
      use_bias: whether 3×3 convolutions have a bias, which starts at 0; None: in the order "swap".
      dtype: what the convolutions compute in; parameters, statistics, features and logits are float32.

    Raises:
      UserError: unknown activation.
    """
    module = PreActResNet(
        depth=depth,
        num_classes=num_classes,
        order=order,
        activation=activations.get(activation),
        use_bias=use_bias,
        dtype=jnp.dtype(dtype),
    )
    return from_linen(module)
