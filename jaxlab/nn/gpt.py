"""The GPT-2 transformer between its embedding and its output layer: [B, T, n] -> [B, T, n], causal.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019. Submodules have the names of the
official code, in whose checkpoints they are `h.0.attn.c_attn` and so on.
"""

import functools
from collections.abc import Callable
from typing import Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from jaxlab.core import UserError

# From queries, keys and values, each [B, T, H, D], to the values each token receives, [B, T, H, D].
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Positions = Literal["learned", "rotary", "none"]

KERNEL_INIT: Initializer = nn.initializers.normal(0.02)

# Flax's default variance, E[x²] − E[x]², loses digits where the mean is large.
layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √D) v for each head, over a token itself and those before it (arXiv 1706.03762).

    The softmax is computed in float32. Equal to `jax.nn.dot_product_attention(q, k, v, is_causal=True)`,
    which takes half as long again on a CPU.
    """
    chex.assert_equal_shape([q, k, v])
    # Heads beside the batch first: none of the products has to move them.
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    length, features = q.shape[-2:]
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32) * features**-0.5
    visible = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)).astype(v.dtype)
    return jnp.einsum("bhts,bhsd->bhtd", weights, v).swapaxes(1, 2)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding of queries or keys [B, T, H, D], D even (Su et al., arXiv 2104.09864).

    At position t the pair of coordinates (i, i + D/2) is turned by the angle t · 10000^(−2i/D), so that the
    product of a query and a key depends on their distance only.
    """
    _, length, _, features = x.shape
    frequencies = 10_000.0 ** (-jnp.arange(0, features, 2) / features)
    angles = (jnp.arange(length)[:, None] * frequencies)[:, None]  # [T, 1, D/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.astype(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention on the tokens [B · T, n] of sequences of one length T; see `GPT`."""

    n_head: int
    rotary: bool
    attention: Attention
    residual_init: Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, length: int) -> jax.Array:
        n = x.shape[-1]
        qkv = nn.Dense(3 * n, dtype=self.dtype, kernel_init=KERNEL_INIT, name="c_attn")(x)
        heads = (-1, length, self.n_head, n // self.n_head)
        q, k, v = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))
        if self.rotary:
            q, k = rotate(q), rotate(k)
        x = self.attention(q, k, v).reshape(x.shape)
        return nn.Dense(n, dtype=self.dtype, kernel_init=self.residual_init, name="c_proj")(x)


class MLP(nn.Module):
    """n → 4n → n with the tanh approximation of GELU, on tokens [B · T, n]; see `GPT`."""

    residual_init: Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n = x.shape[-1]
        x = nn.Dense(4 * n, dtype=self.dtype, kernel_init=KERNEL_INIT, name="c_fc")(x)
        x = jax.nn.gelu(x, approximate=True)
        return nn.Dense(n, dtype=self.dtype, kernel_init=self.residual_init, name="c_proj")(x)


class Block(nn.Module):
    """x + attention(norm(x)), and of that x + MLP(norm(x)), on tokens [B · T, n]; see `GPT`."""

    n_head: int
    rotary: bool
    attention: Attention
    mlp: bool
    dropout: float
    residual_init: Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, length: int, *, train: bool) -> jax.Array:
        norm = functools.partial(layer_norm, dtype=self.dtype)
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        attend = SelfAttention(
            self.n_head, self.rotary, self.attention, self.residual_init, self.dtype, name="attn"
        )
        x = x + dropout(attend(norm(name="ln_1")(x), length))
        if self.mlp:
            mlp = MLP(self.residual_init, self.dtype, name="mlp")
            x = x + dropout(mlp(norm(name="ln_2")(x)))
        return x


class GPT(nn.Module):
    """Pre-norm transformer blocks and a last layer normalisation, on embeddings [B, T, n].

    Kernels start at N(0, 0.02²), those of the two layers that end a block's branches at N(0, 0.02² / 2L),
    biases at 0, learned positions at N(0, 0.02²).

    Attributes:
      n_embd: n, the width of the embeddings.
      n_layer: L, the number of blocks.
      n_head: H, the number of heads, which divides n.
      max_length: the number of learned positions; a longer sequence is a `UserError`. The other kinds of
        positions take sequences of any length.
      positions: "learned": a table that is added to the embeddings; "rotary": see `rotate`; "none": the
        causal mask alone tells tokens apart.
      attention: what mixes the tokens; it must be causal.
      mlp: whether a block has its second branch.
      dropout: the share that training drops of the embeddings and of each branch's output, not of the
        attention weights.
      dtype: what the linear layers and the attention's products compute in; parameters, normalisation,
        softmax, the sum of the branches and the output are float32.
    """

    n_embd: int
    n_layer: int
    n_head: int
    max_length: int | None = None
    positions: Positions = "learned"
    attention: Attention = causal_attention
    mlp: bool = True
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        chex.assert_shape(x, (None, None, self.n_embd))
        shape, length = x.shape, x.shape[1]
        head_size, rest = divmod(self.n_embd, self.n_head)
        if rest:
            raise UserError(f"n_head: {self.n_head} heads do not divide n_embd={self.n_embd}.")
        if self.positions == "rotary" and head_size % 2:
            raise UserError(f"n_head: rotary positions need n_embd / n_head to be even, not {head_size}.")
        if self.positions == "learned":
            if self.max_length is None or length > self.max_length:
                raise UserError(
                    f"positions: {length} tokens, but {self.max_length} learned positions; have more of them,"
                    " or positions='rotary' or 'none'."
                )
            x = x + self.param("wpe", KERNEL_INIT, (self.max_length, self.n_embd))[:length]
        x = nn.Dropout(self.dropout, deterministic=not train)(x.astype(jnp.float32))
        # One axis of tokens: with two, XLA's CPU backend takes half as long again for a kernel's gradient.
        x = x.reshape(-1, self.n_embd)
        for i in range(self.n_layer):
            x = Block(
                n_head=self.n_head,
                rotary=self.positions == "rotary",
                attention=self.attention,
                mlp=self.mlp,
                dropout=self.dropout,
                residual_init=nn.initializers.normal(0.02 * (2 * self.n_layer) ** -0.5),
                dtype=self.dtype,
                name=f"h_{i}",
            )(x, length, train=train)
        return layer_norm(name="ln_f")(x).reshape(shape)
