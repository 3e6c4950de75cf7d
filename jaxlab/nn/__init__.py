"""Neural networks. A config names a builder by its module: `"mlp"` is the function `mlp` of `mlp.py`.

Every network here ends in a linear layer called `head`, so that
`logits = features @ params["head"]["kernel"] + params["head"]["bias"]`, with kernel [F, K] and bias [K].
"""

from jaxlab.nn.linen import from_linen

__all__ = ["from_linen"]
