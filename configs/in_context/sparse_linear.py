"""Sparse linear functions learnt in context (Garg et al., NeurIPS 2022, figure 5a), beside the Lasso.

  python -m launch.train --config configs/in_context/sparse_linear.py --workdir runs/sparse_linear

Arguments: the size, and the backbone, see configs/in_context/experiments.py.
"""

from configs.in_context import experiments
from configs.in_context.experiments import baseline


def get_config(size="cpu", backbone="gpt"):
    paper = experiments.get(size, ("cpu", "paper"), "size") == "paper"
    dimension, num_points, sparsity = (20, 41, 3) if paper else (3, 7, 1)
    model = experiments.MODELS["standard"] if paper else dict(n_embd=64, n_layer=3, n_head=4)
    sparse = dict(name="sparse_linear", sparsity=sparsity)

    c = experiments.config(size, steps=4000, learning_rate=2e-3)
    c.network = experiments.network(backbone, n_positions=101 if paper else num_points, **model)
    c.data = experiments.stream(sparse, dimension, num_points, curriculum=2 if paper else None)
    c.evaluators = dict(
        errors=experiments.errors(
            dimension,
            num_points,
            dict(sparse=sparse, dense=dict(name="linear")),
            baselines=dict(
                lasso_01=baseline("lasso", alpha=0.01),
                lasso_001=baseline("lasso", alpha=0.001),
                least_squares=baseline("least_squares"),
                averaging=baseline("averaging"),
                nearest_neighbors=baseline("knn", k=3),
            ),
        )
    )
    return c
