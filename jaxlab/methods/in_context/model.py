"""The network of in-context learning: a prompt's tokens through a backbone to a prediction at every point.

Garg, Tsipras, Liang & Valiant, NeurIPS 2022 (arXiv 2208.01066); official code: dtsip/in-context-learning.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.core import Network, Outputs, UserError
from jaxlab.methods.in_context.prompts import interleave, read_predictions
from jaxlab.nn.layers import dense
from jaxlab.nn.linen import from_linen


class InContextModel(nn.Module):
    """See `in_context_model`."""

    backbone: nn.Module
    layout: Literal["shared", "own"] = "shared"

    @nn.compact
    def __call__(self, inputs: Mapping[str, jax.Array], *, train: bool) -> Outputs:
        tokens = interleave(inputs["xs"], inputs["ys"], self.layout)
        embeddings = dense(tokens, self.backbone.n_embd, name="read_in")
        hidden = self.backbone(embeddings, train=train).astype(jnp.float32)
        out = dense(hidden, 1, name="read_out")
        return {"predictions": read_predictions(out), "features": hidden[:, ::2]}


def in_context_model(backbone: nn.Module, *, layout: Literal["shared", "own"] = "shared") -> Network:
    """Read-in layer, backbone and read-out layer, on prompts {"xs": [B, K, d], "ys": [B, K]}.

    Its outputs are `predictions` [B, K] and the hidden states they are read from, `features` [B, K, n].
    Prediction i is for x_i and depends on x_0, y_0, ..., x_{i−1}, y_{i−1}, x_i only; the last label is in the
    tokens and without effect. Read-in and read-out start as PyTorch's linear layers do.

    Args:
      backbone: one of `backbones`, or any causal Linen module [B, 2K, n] -> [B, 2K, n] with `n_embd` = n.
      layout: where a token has its label; see `interleave`.

    Raises:
      UserError: unknown layout, or a prompt longer than the backbone's positions, when it is called.
    """
    return from_linen(InContextModel(backbone, layout))


def load_gpt2_params(flat_dict: Mapping[str, np.ndarray]) -> dict[str, chex.ArrayTree]:
    """The parameters of `in_context_model(gpt(...))` from a state dict of the official code.

    Sizes are those of the tensors, but the number of heads, which no tensor shows. The unused token table
    `wte` and the buffers of the causal mask are left out.

    Args:
      flat_dict: by official name, such as `_backbone.h.0.attn.c_attn.weight`.

    Returns:
      The value of `variables["params"]`: views of the tensors given.

    Raises:
      UserError: a tensor is missing, has an unexpected shape, or belongs to no part of the model.
    """
    ignored = re.compile(r"_backbone\.(wte\.weight|h\.\d+\.attn\.(masked_)?bias)")
    tensors = {name: np.asarray(value) for name, value in flat_dict.items() if not ignored.fullmatch(name)}

    def take(name: str, *shape: int | None) -> np.ndarray:
        if name not in tensors:
            raise UserError(f"{name}: missing; is this the state dict of a TransformerModel?")
        value = tensors.pop(name)
        if value.ndim != len(shape) or any(s not in (None, v) for s, v in zip(shape, value.shape)):
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise UserError(f"{name}: shape {value.shape}, expected ({expected}).")
        return value

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": take(f"{name}.weight", n), "bias": take(f"{name}.bias", n)}

    def linear(name: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
        return {"kernel": take(f"{name}.weight", inputs, outputs), "bias": take(f"{name}.bias", outputs)}

    def block(name: str) -> dict[str, Any]:
        return {
            "ln_1": norm(f"{name}.ln_1"),
            "attn": {
                "c_attn": linear(f"{name}.attn.c_attn", n, 3 * n),
                "c_proj": linear(f"{name}.attn.c_proj", n, n),
            },
            "ln_2": norm(f"{name}.ln_2"),
            "mlp": {
                "c_fc": linear(f"{name}.mlp.c_fc", n, 4 * n),
                "c_proj": linear(f"{name}.mlp.c_proj", 4 * n, n),
            },
        }

    # The two linear layers around the backbone are stored (out, in); those inside are (in, out) as here.
    read_in = take("_read_in.weight", None, None).T
    n = read_in.shape[1]
    layers = {found[1] for name in tensors if (found := re.match(r"_backbone\.h\.(\d+)\.", name))}
    params = {
        "read_in": {"kernel": read_in, "bias": take("_read_in.bias", n)},
        "backbone": {
            "wpe": take("_backbone.wpe.weight", None, n),
            **{f"h_{i}": block(f"_backbone.h.{i}") for i in range(len(layers))},
            "ln_f": norm("_backbone.ln_f"),
        },
        "read_out": {"kernel": take("_read_out.weight", 1, n).T, "bias": take("_read_out.bias", 1)},
    }
    if tensors:
        raise UserError(f"{next(iter(tensors))}: no part of this model.")
    return params
