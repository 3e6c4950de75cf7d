"""Backbones: causal maps of token embeddings [B, T, n] -> [B, T, n], for `in_context_model`.

A backbone is a Linen module `module(x, train=...)` with an attribute `n_embd`, which is n. Builders name
their sizes as the official code does (dtsip/in-context-learning).
"""

import functools
import math
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer, variance_scaling

from jaxlab.core import UserError
from jaxlab.nn.gpt import GPT, Attention, Positions, causal_attention, layer_norm
from jaxlab.nn.layers import FAN_IN_UNIFORM, dense


class TransformerConfig(NamedTuple):
    """The sizes of a transformer; the arguments of `gpt` that go by these names.

    Attributes:
      n_positions: the most points K of a prompt.
      n_embd: n, the width.
      n_layer: the number of blocks.
      n_head: the number of heads.
      dropout: the share of each branch that training drops.
    """

    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    dropout: float = 0.0


# Garg et al., arXiv 2208.01066: the three models of section 6, "standard" being that of all the others.
SIZES = {
    "tiny": TransformerConfig(n_positions=101, n_embd=64, n_layer=3, n_head=2),
    "small": TransformerConfig(n_positions=101, n_embd=128, n_layer=6, n_head=4),
    "standard": TransformerConfig(n_positions=101, n_embd=256, n_layer=12, n_head=8),
}


# --- Attention ---


def gpt(
    *,
    n_embd: int,
    n_layer: int,
    n_head: int,
    n_positions: int = 101,
    positions: Positions = "learned",
    dropout: float = 0.0,
    attention: Literal["xla", "cudnn"] = "xla",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> nn.Module:
    """GPT-2, the backbone of Garg et al.; sizes are in `SIZES`, the rest is in `jaxlab.nn.gpt.GPT`.

    Args:
      n_embd: n.
      n_layer: the number of blocks.
      n_head: the number of heads.
      n_positions: the most points of a prompt: a point is two tokens, so there are 2 · n_positions learned
        positions. Those that training never reaches are of no use. Other positions do without.
      positions: "learned", "rotary" or "none".
      dropout: the share of the embeddings and of each branch's output that training drops.
      attention: "cudnn" is the fused kernel for GPUs, in bfloat16 only.
      dtype: what the products compute in; parameters, normalisation, softmax and output are float32.

    Raises:
      UserError: cuDNN in float32.
    """
    function: Attention = causal_attention
    if attention == "cudnn":
        if dtype != "bfloat16":
            raise UserError(f"attention: 'cudnn' needs dtype='bfloat16', got '{dtype}'.")
        function = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return GPT(
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        max_length=2 * n_positions,
        positions=positions,
        attention=function,
        dropout=dropout,
        dtype=jnp.dtype(dtype),
    )


def causal_linear_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """(1/t) Σ_s (q_t · k_s / √D) v_s over the first t tokens s, for each head; [B, T, H, D].

    The attention in which von Oswald et al. (arXiv 2212.07677) find gradient descent, made causal.
    """
    length, features = q.shape[1], q.shape[-1]
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32) * features**-0.5
    weights = jnp.tril(scores) / jnp.arange(1, length + 1)[:, None]
    return jnp.einsum("bhts,bhsd->bhtd", weights.astype(v.dtype), v).swapaxes(1, 2)


def linear_attention(
    *,
    n_embd: int,
    n_layer: int,
    n_head: int,
    n_positions: int = 101,
    positions: Positions = "learned",
    mlp: bool = True,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> nn.Module:
    """GPT-2 with `causal_linear_attention` for its attention; arguments as in `gpt`.

    Args:
      n_embd: n.
      n_layer: the number of blocks.
      n_head: the number of heads.
      n_positions: the most points of a prompt, with learned positions.
      positions: "learned", "rotary" or "none".
      mlp: whether a block has an MLP after its attention.
      dtype: what the products compute in.
    """
    return GPT(
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        max_length=2 * n_positions,
        positions=positions,
        attention=causal_linear_attention,
        mlp=mlp,
        dtype=jnp.dtype(dtype),
    )


# --- Recurrence ---


class Recurrent(nn.Module):
    """Recurrent layers, each on the hidden states of the one before; see `lstm` and `gru`."""

    cell: type[nn.RNNCellBase]
    n_embd: int
    n_layer: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for i in range(self.n_layer):
            x = nn.RNN(self.cell(self.n_embd), name=f"layer_{i}")(x)
        return x


def lstm(*, n_embd: int, n_layer: int) -> nn.Module:
    """`n_layer` LSTM layers of `n_embd` units (Hochreiter & Schmidhuber, 1997), for prompts of any length."""
    return Recurrent(nn.OptimizedLSTMCell, n_embd, n_layer)


def gru(*, n_embd: int, n_layer: int) -> nn.Module:
    """`n_layer` GRU layers of `n_embd` units (Cho et al., arXiv 1406.1078), for prompts of any length."""
    return Recurrent(nn.GRUCell, n_embd, n_layer)


def selective_scan(u: jax.Array, delta: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """y_t = h_t c_t of the states h_t = exp(Δ_t a) h_{t−1} + Δ_t u_t b_tᵀ, h_0 = 0, elementwise in [E, N].

    Gu & Dao, "Mamba", arXiv 2312.00752, algorithm 2, with the Euler step for b that their code takes.

    Args:
      u: the inputs [B, T, E].
      delta: the step sizes, positive, [B, T, E].
      a: negative, [E, N].
      b: how an input enters the states, [B, T, N].
      c: how they are read, [B, T, N].

    Returns:
      [B, T, E].
    """
    decay = jnp.exp(delta[..., None] * a)
    drive = (delta * u)[..., None] * b[:, :, None]

    def combine(earlier: tuple[jax.Array, jax.Array], later: tuple[jax.Array, jax.Array]) -> tuple:
        return earlier[0] * later[0], earlier[1] * later[0] + later[1]

    _, states = jax.lax.associative_scan(combine, (decay, drive), axis=1)
    return jnp.einsum("bten,btn->bte", states, c)


def _step_size_bias(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """softplus⁻¹ of step sizes that are log-uniform in [0.001, 0.1]."""
    steps = jnp.exp(jax.random.uniform(key, shape, dtype, np.log(0.001), np.log(0.1)))
    return steps + jnp.log(-jnp.expm1(-steps))


def _log_decay_rates(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """log(−a), where −a = 1, ..., N in each channel."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1.0, shape[1] + 1)), shape)


class SelectiveSSM(nn.Module):
    """Mamba's layer, [B, T, n] -> [B, T, n]; see `state_space`."""

    n_state: int
    expand: int
    conv_width: int
    residual_init: Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, length = x.shape[-1], x.shape[1]
        width, rank = self.expand * n, math.ceil(n / 16)
        u, gate = jnp.split(dense(x, 2 * width, use_bias=False, name="in_proj"), 2, axis=-1)
        # A causal depthwise convolution: row i of its kernel is for the input i tokens before.
        kernel = self.param("conv_kernel", FAN_IN_UNIFORM, (self.conv_width, width))
        shifted = (jnp.pad(u, ((0, 0), (i, 0), (0, 0)))[:, :length] for i in range(self.conv_width))
        u = nn.silu(sum(row * x for row, x in zip(kernel, shifted)))

        parts = dense(u, rank + 2 * self.n_state, use_bias=False, name="x_proj")
        low_rank, b, c = jnp.split(parts, [rank, rank + self.n_state], axis=-1)
        delta = nn.softplus(dense(low_rank, width, bias_init=_step_size_bias, name="dt_proj"))
        log_a = self.param("log_a", _log_decay_rates, (width, self.n_state))
        skip = self.param("skip", nn.initializers.ones, (width,))
        y = selective_scan(u, delta, -jnp.exp(log_a), b, c) + skip * u
        return dense(y * nn.silu(gate), n, use_bias=False, kernel_init=self.residual_init, name="out_proj")


class StateSpace(nn.Module):
    """See `state_space`."""

    n_embd: int
    n_layer: int
    n_state: int
    expand: int
    conv_width: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        residual_init = variance_scaling(1 / (3 * self.n_layer), "fan_in", "uniform")
        for i in range(self.n_layer):
            layer = SelectiveSSM(self.n_state, self.expand, self.conv_width, residual_init, name=f"layer_{i}")
            x = x + layer(layer_norm(name=f"norm_{i}")(x))
        return layer_norm(name="norm")(x)


def state_space(
    *, n_embd: int, n_layer: int, n_state: int = 16, expand: int = 2, conv_width: int = 4
) -> nn.Module:
    """Pre-norm Mamba layers (Gu & Dao, arXiv 2312.00752), for prompts of any length; initialised as theirs.

    Two of them have about the parameters of one transformer block. Normalisation is GPT-2's and the
    convolution has no bias.

    Args:
      n_embd: n.
      n_layer: the number of layers.
      n_state: N, the states of each channel.
      expand: a layer has E = expand · n channels.
      conv_width: the tokens that the convolution before the recurrence sees.
    """
    return StateSpace(n_embd, n_layer, n_state, expand, conv_width)


# --- Weight tying ---


class Looped(nn.Module):
    """See `looped`."""

    block: nn.Module
    loops: int

    @property
    def n_embd(self) -> int:
        return self.block.n_embd

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        z = jnp.zeros_like(x)
        # Not a scan: it would be compiled once, but run a third slower on a CPU.
        for _ in range(self.loops):
            z = self.block(z + x, train=train)
        return z


def looped(block: nn.Module, *, loops: int) -> nn.Module:
    """z ← block(z + x), `loops` times from z = 0, with the same weights (Yang et al., arXiv 2311.12424).

    The input x enters every loop. Theirs is `block=gpt(n_layer=1, ...)`, its positions and last normalisation
    in the loop; they average the loss over the last loops, where here only the last one is read.

    Args:
      block: any backbone.
      loops: how often it is applied.
    """
    return Looped(block, loops)
