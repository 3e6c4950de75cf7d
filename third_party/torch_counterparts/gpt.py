"""The network of `jaxlab.methods.in_context` with a GPT-2 backbone, after dtsip/in-context-learning."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from third_party.torch_counterparts import NoCounterpart, call


class Block(nn.Module):
    """GPT-2's, as its usual PyTorch implementations have it."""

    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(n_embd, 3 * n_embd), "c_proj": nn.Linear(n_embd, n_embd)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(n_embd, 4 * n_embd), "c_proj": nn.Linear(4 * n_embd, n_embd)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, n = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).view(batch, length, 3, self.n_head, n // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](attended.transpose(1, 2).reshape(batch, length, n))
        h = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](h)


class GPT(nn.Module):
    def __init__(self, *, n_embd: int, n_layer: int, n_head: int, n_positions: int = 101):
        super().__init__()
        self.n_embd = n_embd
        self.wpe = nn.Parameter(0.02 * torch.randn(2 * n_positions, n_embd))
        self.h = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.wpe[: x.shape[1]]
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class InContextModel(nn.Module):
    """Prompts xs [B, K, d], ys [B, K] to predictions [B, K]; `layout` "shared"."""

    def __init__(self, dimension: int, backbone: nn.Module):
        super().__init__()
        self.read_in = nn.Linear(dimension, backbone.n_embd)
        self.backbone = backbone
        self.read_out = nn.Linear(backbone.n_embd, 1)

    def forward(self, xs: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
        batch, length, dimension = xs.shape
        wide = torch.cat([ys[..., None], torch.zeros(batch, length, dimension - 1, device=xs.device)], dim=2)
        tokens = torch.stack([xs, wide], dim=2).view(batch, 2 * length, dimension)
        return self.read_out(self.backbone(self.read_in(tokens)))[:, ::2, 0]


def in_context_model(
    prompt_shape: Sequence[int], *, backbone: Mapping[str, Any], layout: str = "shared"
) -> InContextModel:
    """For prompts of xs [K, d]."""
    if layout != "shared":
        raise NoCounterpart(f"no counterpart of layout {layout}")
    return InContextModel(prompt_shape[-1], call({"gpt": GPT}, backbone))
