"""Starts `jaxlab.nn.imagenet_resnet` from the weights of torchvision's ResNet-18 or ResNet-50.

The file is what `torch.save(torchvision.models.resnet50(...).state_dict(), path)` writes, or one that
torchvision publishes, such as resnet18-f37072fd.pth and resnet50-0676ba61.pth. Those published before 2021,
such as resnet50-19c8e357.pth, are no zip archives, which is all that is read. The published weights expect
RGB images in [0, 1], less the mean (0.485, 0.456, 0.406), over the deviation (0.229, 0.224, 0.225).
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.core import Network, UserError, Variables
from jaxlab.nn.imagenet_resnet import imagenet_resnet
from third_party.torch_checkpoints import read_state_dict

_MODULES = {
    "stem": "conv1",
    "stem_norm": "bn1",
    "shortcut_conv": "downsample.0",
    "shortcut_norm": "downsample.1",
    "head": "fc",
}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def torchvision_resnet_variables(
    state_dict: Mapping[str, np.ndarray], *, num_classes: int | None
) -> Variables:
    """The variables of `imagenet_resnet` from a state dict of torchvision's ResNet-18 or ResNet-50.

    Which of the two it is, the names tell. The counters `num_batches_tracked` are left out.

    Args:
      state_dict: by torchvision's name, such as `layer1.0.conv1.weight`, of a network on 3 channels.
      num_classes: None leaves out the head `fc`; otherwise the number of classes that it has.

    Returns:
      {"params", "batch_stats"} in float32; where the tensors are, views of them.

    Raises:
      UserError: a tensor is missing, has an unexpected shape, or belongs to no part of the network; or the
        head has another number of classes.
    """
    depth = _depth(state_dict)
    tensors = {
        name: np.asarray(value)
        for name, value in state_dict.items()
        if not name.endswith(".num_batches_tracked")
    }
    if num_classes is None:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("fc.")}
    elif "fc.bias" in tensors and tensors["fc.bias"].size != num_classes:
        raise UserError(
            f"num_classes: {num_classes}, but the head fc has {tensors['fc.bias'].size} classes; give that"
            " number, or None to leave the head out."
        )

    def take(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = _torchvision_name([entry.key for entry in path])
        if name not in tensors:
            raise UserError(f"{name}: missing; is this the state dict of torchvision's ResNet-{depth}?")
        # PyTorch stores kernels as (out, in) and (out, in, height, width).
        axes = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[leaf.ndim]
        value, expected = tensors.pop(name), tuple(leaf.shape[axis] for axis in axes)
        if value.shape != expected:
            raise UserError(f"{name}: shape {value.shape}, expected {expected} of a ResNet-{depth}.")
        return value.transpose(np.argsort(axes)).astype(leaf.dtype, copy=False)

    variables = jax.tree_util.tree_map_with_path(take, _shapes(num_classes, depth))
    if tensors:
        raise UserError(
            f"{next(iter(tensors))}: no part of torchvision's ResNet-{depth}; it may be 18 or 50."
        )
    return variables


def torchvision_resnet(
    num_classes: int | None,
    *,
    path: str,
    depth: Literal[18, 50],
    freeze_batch_norm: bool = False,
    dropout_rate: float = 0.0,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """An `imagenet_resnet` that starts from the weights and statistics in a file, with a fresh head.

    In a config: `network = dict(name="third_party.torchvision_resnet:torchvision_resnet",
    path="resnet50-0676ba61.pth", depth=50)`.

    Args:
      num_classes: K, the number of logits; None: an encoder, which has no head and gives features only.
      path: a .pth file of PyTorch; nothing in it is run. The head in it, if it has one, is not used.
      depth: of the network in the file.
      freeze_batch_norm: as for `imagenet_resnet`.
      dropout_rate: as for `imagenet_resnet`.
      dtype: as for `imagenet_resnet`.

    Returns:
      A network on images [B, H, W, 3].

    Raises:
      UserError: the file cannot be read or has another network; or, from `init`, the images do not have 3
        channels.
    """
    network = imagenet_resnet(
        num_classes,
        depth=depth,
        freeze_batch_norm=freeze_batch_norm,
        dropout_rate=dropout_rate,
        dtype=dtype,
    )
    state_dict = read_state_dict(path)
    try:
        pretrained = torchvision_resnet_variables(state_dict, num_classes=None)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if _depth(state_dict) != depth:
        raise UserError(f"depth: {depth}, but {path} has a ResNet-{_depth(state_dict)}.")

    def init(key: chex.PRNGKey, inputs: jax.Array) -> Variables:
        if inputs.shape[-1] != 3:
            raise UserError(f"network: {path} is for images of 3 channels, these have {inputs.shape[-1]}.")
        loaded = jax.tree.map(jnp.asarray, pretrained)
        fresh = network.init(key, inputs)["params"]
        return {"params": {**fresh, **loaded["params"]}, "batch_stats": loaded["batch_stats"]}

    return Network(init, network.apply)


def _depth(state_dict: Mapping[str, np.ndarray]) -> Literal[18, 50]:
    return 50 if "layer1.0.conv3.weight" in state_dict else 18


def _shapes(num_classes: int | None, depth: Literal[18, 50]) -> Variables:
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(imagenet_resnet(num_classes, depth=depth).init, jax.random.key(0), images)


def _torchvision_name(path: list[str]) -> str:
    """params/group2_block1/norm1/scale is layer2.0.bn1.weight."""
    _, *modules, leaf = path
    return ".".join([*map(_torchvision_module, modules), _LEAVES[leaf]])


def _torchvision_module(module: str) -> str:
    if found := re.fullmatch(r"group(\d)_block(\d)", module):
        return f"layer{found[1]}.{int(found[2]) - 1}"
    return _MODULES.get(module, module.replace("norm", "bn"))
