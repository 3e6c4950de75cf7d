"""Residual networks for ImageNet-sized images (He et al., "Deep Residual Learning", arXiv 1512.03385).

As torchvision has them, down to where the kernels start, so that `third_party.torchvision_resnet` can read
its weights. In a bottleneck the 3×3 convolution carries the stride ("v1.5"), not the first 1×1 as in the
paper. `jaxlab.nn.resnet` has the networks for small images.
"""

import functools
from typing import Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlab.core import Network, Outputs
from jaxlab.nn.layers import HE_NORMAL_FAN_OUT, classify
from jaxlab.nn.linen import from_linen
from jaxlab.nn.normalization import BatchNorm, NormActivation, sow_activations
from jaxlab.nn.resnet import BasicBlock

_WIDTHS = (64, 128, 256, 512)
_BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions, the last to 4·`features` channels, and a shortcut."""

    features: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=HE_NORMAL_FAN_OUT)
        norm_relu = functools.partial(NormActivation, activation=jax.nn.relu, order="convention")
        h = norm_relu(name="norm1")(conv(self.features, (1, 1), name="conv1")(x), train=train)
        h = conv(self.features, (3, 3), strides=self.stride, padding=1, name="conv2")(h)
        h = norm_relu(name="norm2")(h, train=train)
        h = conv(4 * self.features, (1, 1), name="conv3")(h)
        h = BatchNorm(name="norm3")(h, train=train)
        if x.shape != h.shape:
            x = conv(h.shape[-1], (1, 1), strides=self.stride, padding=0, name="shortcut_conv")(x)
            x = BatchNorm(name="shortcut_norm")(x, train=train)
        out = jax.nn.relu(h + x)
        sow_activations(self, out, out)
        return out


class ImageNetResNet(nn.Module):
    """See `imagenet_resnet`."""

    num_classes: int | None
    blocks: tuple[int, int, int, int]
    bottleneck: bool
    freeze_batch_norm: bool
    dropout_rate: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool) -> Outputs:
        chex.assert_rank(inputs, 4)
        if self.bottleneck:
            make_block = functools.partial(Bottleneck, dtype=self.dtype)
        else:
            make_block = functools.partial(
                BasicBlock,
                project=True,
                order="convention",
                activation=jax.nn.relu,
                use_bias=False,
                kernel_init=HE_NORMAL_FAN_OUT,
                dtype=self.dtype,
            )
        batch_statistics = train and not self.freeze_batch_norm
        stem = nn.Conv(
            _WIDTHS[0],
            (7, 7),
            strides=2,
            padding=3,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=HE_NORMAL_FAN_OUT,
            name="stem",
        )
        norm_relu = NormActivation(activation=jax.nn.relu, order="convention", name="stem_norm")
        x = norm_relu(stem(inputs.astype(self.dtype)), train=batch_statistics)
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for group, (width, blocks) in enumerate(zip(_WIDTHS, self.blocks), start=1):
            for block in range(1, blocks + 1):
                x = make_block(
                    features=width,
                    stride=2 if group > 1 and block == 1 else 1,
                    name=f"group{group}_block{block}",
                )(x, train=batch_statistics)
        features = x.mean((1, 2), dtype=jnp.float32)
        features = nn.Dropout(self.dropout_rate, deterministic=not train)(features)
        return classify(features, self.num_classes)


def imagenet_resnet(
    num_classes: int | None,
    *,
    depth: Literal[18, 50],
    freeze_batch_norm: bool = False,
    dropout_rate: float = 0.0,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """An ImageNet ResNet on images [B, H, W, C]; its last convolutions see them at a 32nd of their size.

    Args:
      num_classes: K, the number of logits; None: an encoder, which has no head and gives features only.
      depth: 18, of basic blocks (F = 512), or 50, of bottlenecks (F = 2048).
      freeze_batch_norm: training normalises with the running statistics too, and leaves them as they are;
        scales and biases are still trained. For fine-tuning from a file's statistics, as DomainBed does it
        (Gulrajani and Lopez-Paz, arXiv 2007.01434).
      dropout_rate: the share of features that training drops. The dropped features are those that are
        returned and that the head takes, as in DomainBed.
      dtype: what the convolutions compute in; parameters, statistics, features and logits are float32.
    """
    module = ImageNetResNet(
        num_classes=num_classes,
        blocks=_BLOCKS[depth],
        bottleneck=depth == 50,
        freeze_batch_norm=freeze_batch_norm,
        dropout_rate=dropout_rate,
        dtype=jnp.dtype(dtype),
    )
    return from_linen(module)
