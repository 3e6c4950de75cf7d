"""VGG for small images: 3×3 convolutions with batch normalisation, max pooling, one linear layer.

Simonyan & Zisserman, arXiv 1409.1556, table 1, with batch normalisation and a single linear layer behind the
convolutions, as VGG is commonly used on CIFAR and by the first author of *Tanh Works Better With Asymmetry*
(Kim, Kim & Kim, NeurIPS 2023), whose start of the parameters this is.
"""

from typing import Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from jaxlab.core import Network, Outputs, UserError
from jaxlab.core.errors import nearest
from jaxlab.nn import activations
from jaxlab.nn.activations import Activation, submodule
from jaxlab.nn.layers import HE_NORMAL_FAN_OUT, classify
from jaxlab.nn.linen import from_linen
from jaxlab.nn.normalization import NormActivation, Order, needs_bias, sow_activations

# Channels of the convolutions; "M" is a 2×2 max pooling. The paper's columns A, B, D and E.
LAYOUTS: dict[str, tuple[int | str, ...]] = {
    "vgg11": (64, "M", 128, "M", *(256,) * 2, "M", *(512,) * 2, "M", *(512,) * 2, "M"),
    "vgg13": (*(64,) * 2, "M", *(128,) * 2, "M", *(256,) * 2, "M", *(512,) * 2, "M", *(512,) * 2, "M"),
    "vgg16": (*(64,) * 2, "M", *(128,) * 2, "M", *(256,) * 3, "M", *(512,) * 3, "M", *(512,) * 3, "M"),
    "vgg19": (*(64,) * 2, "M", *(128,) * 2, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4, "M"),
}


class ConvNormAct(nn.Module):
    """A convolution of stride 1, normalisation and activation in either order, [B, H, W, C] -> [B, H, W, F].

    Attributes:
      features: F.
      kernel: its height and width; odd, with zero padding that keeps H and W.
      order: where the normalisation stands.
      activation: the activation.
      use_bias: whether the convolution has a bias, which starts at 0; None: unless a norm cancels it.
      norm: the normalisation, if any.
      kernel_init: of the kernel.
      dtype: what the convolution computes in.
    """

    features: int
    kernel: int = 3
    order: Order = "convention"
    activation: str | Activation = "relu"
    use_bias: bool | None = None
    norm: Literal["batch_norm"] | None = "batch_norm"
    kernel_init: Initializer = HE_NORMAL_FAN_OUT
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        order = self.order if self.norm else "swap"
        conv = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            use_bias=needs_bias(self.use_bias, order),
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            name="conv",
        )
        activation = activations.get(self.activation)
        if self.norm:
            return NormActivation(activation=activation, order=order, name="norm")(conv(x), train=train)
        x = submodule(activation, "shift")(conv(x))
        sow_activations(self, x, x)
        return x


class VGG(nn.Module):
    """See `vgg`."""

    cfg: tuple[int | str, ...]
    num_classes: int | None
    order: Order = "convention"
    activation: str | Activation = "relu"
    use_bias: bool | None = None
    norm: Literal["batch_norm"] | None = "batch_norm"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool) -> Outputs:
        chex.assert_rank(inputs, 4)
        x = inputs.astype(self.dtype)
        layers = 0
        for entry in self.cfg:
            if entry == "M":
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            else:
                layers += 1
                x = ConvNormAct(
                    features=entry,
                    order=self.order,
                    activation=self.activation,
                    use_bias=self.use_bias,
                    norm=self.norm,
                    dtype=self.dtype,
                    name=f"layer{layers}",
                )(x, train=train)
        if x.size == 0:
            raise UserError(f"network.cfg: its max poolings leave nothing of images {inputs.shape[1:3]}.")
        return classify(
            x.reshape(len(x), -1),
            self.num_classes,
            kernel_init=nn.initializers.normal(0.01),
            bias_init=nn.initializers.zeros,
        )


def vgg(
    num_classes: int | None,
    *,
    cfg: str | tuple[int | str, ...] = "vgg16",
    order: Order = "convention",
    activation: str | Activation = "relu",
    use_bias: bool | None = None,
    norm: Literal["batch_norm"] | None = "batch_norm",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """A VGG on images [B, H, W, C]; max pooling comes behind both normalisation and activation.

    The `VGG16_11` of the asymmetry paper, with 11 convolutions, is described in no source that could be read;
    a `cfg` of one's own stands for it.

    Args:
      num_classes: K, the number of logits; None: an encoder, which has no head and gives features only.
      cfg: "vgg11", "vgg13", "vgg16" or "vgg19", or the channels of each convolution and "M" for each pooling.
      order: whether batch normalisation stands before ("convention") or after ("swap") the activation.
      activation: one of `jaxlab.nn.activations`, or its name.
      use_bias: whether convolutions have a bias, which starts at 0; None: unless a normalisation cancels it.
      norm: the normalisation of each convolution, if any.
      dtype: what the convolutions compute in; parameters, statistics, features and logits are float32.

    Raises:
      UserError: unknown activation or layout, or more poolings than the images have halves.
    """
    if isinstance(cfg, str):
        if cfg not in LAYOUTS:
            raise UserError(
                f"network.cfg: no '{cfg}'.{nearest(cfg, LAYOUTS)} There are: {', '.join(LAYOUTS)}."
            )
        cfg = LAYOUTS[cfg]
    if not all(entry == "M" or (isinstance(entry, int) and entry > 0) for entry in cfg):
        raise UserError(f"network.cfg: expected channels and 'M', got {cfg}.")
    module = VGG(
        cfg=cfg,
        num_classes=num_classes,
        order=order,
        activation=activations.get(activation),
        use_bias=use_bias,
        norm=norm,
        dtype=jnp.dtype(dtype),
    )
    return from_linen(module)
