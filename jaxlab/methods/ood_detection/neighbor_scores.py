"""Out-of-distribution scores by the nearest neighbours among a bank of training features.

Both are **larger for OOD examples**, and fitted as the scores of `feature_scores.py` are. Examples meet the
bank in chunks, of which only the k largest similarities are kept, and it may be spread over devices.
"""

import jax
import jax.numpy as jnp

from jaxlab.core import UserError
from jaxlab.methods.ood_detection.energy import at_least_float32, energy
from jaxlab.methods.ood_detection.logit_scores import Head, ScoreState

_QUERIES = 1024  # compared with the bank at a time, so that the similarities stay in the cache
_OUT_OF_REACH = 1e30  # less than any similarity, and finite: products of split floats make NaN of infinity
_SHORTEST = 1e-10  # added to the lengths that are divided by: features of zeros stay zeros


def fit_knn(
    features: jax.Array,
    logits: jax.Array,
    labels: jax.Array,
    head: Head,
    *,
    k: int = 50,
    chunk: int = 16_384,
    shards: int = 1,
) -> ScoreState:
    """A bank of features of unit length.

    Sun, Ming, Zhu & Li, *Out-of-Distribution Detection with Deep Nearest Neighbors*, ICML 2022: k = 50 on
    CIFAR-10 and 1000 on ImageNet, where the bank may be a random part of the training data.

    Args:
      features: [N, D].
      logits, labels, head: not used.
      k: which neighbour `knn_score` will look for; at most N.
      chunk: rows of the bank that are compared with at a time, which bounds the memory that a score takes.
      shards: how many parts the bank has, to lay over as many devices by the first axis of the state's
        arrays. Each device then holds and multiplies its part; what a chunk gives is gathered to be
        ranked, for XLA does not split `top_k`.

    Returns:
      `bank` [shards, chunks, rows, D + 1], whose last column is minus half the squared length of a row, and
      out of reach for rows of zeros that fill up the last chunks.

    Raises:
      UserError: `k` is not within 1 and N, or `chunk` or `shards` below 1.
    """
    bank = _unit_length(features)
    return _chunk_bank(bank, jnp.sum(bank**2, axis=-1) / 2, k, chunk, shards)


def knn_score(state: ScoreState, features: jax.Array, logits: jax.Array, *, k: int = 50) -> jax.Array:
    """Squared distance to the k-th nearest row of the bank, all of unit length; [B, D] -> [B].

    A feature vector of zeros stays one, at a distance of 1 from all others. The logits are not used.
    """
    queries = _unit_length(features)
    kth = _largest_similarities(state, queries, k)[:, -1]  # z·b - |b|²/2 = (|z|² - |z - b|²) / 2
    return jnp.maximum(jnp.sum(queries**2, axis=-1) - 2 * kth, 0)


def fit_nnguide(
    features: jax.Array,
    logits: jax.Array,
    labels: jax.Array,
    head: Head,
    *,
    k: int = 100,
    chunk: int = 16_384,
    shards: int = 1,
) -> ScoreState:
    """A bank of features of unit length, each times the LSE of its logits.

    Park, Jung & Teoh, *Nearest Neighbor Guidance for Out-of-Distribution Detection*, ICCV 2023; OpenOOD fits
    it on a random hundredth of the training data.

    Args:
      features: [N, D].
      logits: [N, C].
      labels, head: not used.
      k, chunk, shards: as for `fit_knn`.

    Returns:
      `bank` as `fit_knn` does, but that the last column of real rows is 0.

    Raises:
      UserError: as for `fit_knn`.
    """
    bank = -energy(logits)[:, None] * _unit_length(features)
    return _chunk_bank(bank, jnp.zeros_like(bank[:, 0]), k, chunk, shards)


def nnguide_score(state: ScoreState, features: jax.Array, logits: jax.Array, *, k: int = 100) -> jax.Array:
    """-LSE(f) times the mean of the k largest inner products with the bank, [B, D], [B, C] -> [B]."""
    similarities = _largest_similarities(state, _unit_length(features), k)
    return energy(logits) * jnp.mean(similarities, axis=-1)


def _unit_length(features: jax.Array) -> jax.Array:
    features = at_least_float32(features)
    return features / (jnp.linalg.norm(features, axis=-1, keepdims=True) + _SHORTEST)


def _chunk_bank(bank: jax.Array, penalty: jax.Array, k: int, chunk: int, shards: int) -> ScoreState:
    size = len(bank)
    if not 1 <= k <= size:
        raise UserError(f"k: expected 1 to {size}, the examples that are fitted on, got {k}.")
    for name, value in (("chunk", chunk), ("shards", shards)):
        if value < 1:
            raise UserError(f"{name}: expected 1 or more, got {value}.")
    chunks = -(-size // (shards * chunk))
    rows = -(-size // (shards * chunks))
    filling = shards * chunks * rows - size
    bank = jnp.pad(bank, ((0, filling), (0, 0)))
    penalty = jnp.pad(penalty, (0, filling), constant_values=_OUT_OF_REACH)
    bank = jnp.concatenate([bank, -penalty[:, None]], axis=-1)
    return {"bank": bank.reshape(shards, chunks, rows, -1)}


def _largest_similarities(state: ScoreState, queries: jax.Array, k: int) -> jax.Array:
    """The k largest of query · row - penalty over the rows of the bank, descending; [B, D] -> [B, k]."""
    queries = jnp.pad(queries, ((0, 0), (0, 1)), constant_values=1)  # meets the penalty in the last column

    # Shards are the outermost axis, which lets the compiler split the products over devices.
    def of_shard(bank: jax.Array) -> jax.Array:
        def of_query(query: jax.Array) -> jax.Array:
            def of_chunk(best: jax.Array, rows: jax.Array) -> tuple[jax.Array, None]:
                similarities = jnp.matmul(rows, query, precision="highest")
                # Ranked by themselves: to append the best so far would copy the whole chunk.
                largest, _ = jax.lax.top_k(similarities, min(k, len(rows)))
                return jax.lax.top_k(jnp.concatenate([best, largest]), k)[0], None

            none_yet = jnp.full(k, -jnp.inf, bank.dtype)
            return jax.lax.scan(of_chunk, none_yet, bank)[0]

        return jax.lax.map(of_query, queries, batch_size=_QUERIES)

    best = jax.vmap(of_shard, out_axes=1)(state["bank"])
    return jax.lax.top_k(best.reshape(len(queries), -1), k)[0]
