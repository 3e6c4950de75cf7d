"""Sparse linear functions learnt in context (Garg et al., NeurIPS 2022, figure 5a), beside the Lasso.

  python -m launch.train --config configs/in_context/sparse_linear.py --workdir runs/sparse_linear

Arguments: the size, and the backbone, see configs/in_context/experiments.py.
"""

from configs.arguments import check
from configs.in_context import experiments
from configs.in_context.experiments import baseline


def get_config(size="cpu", backbone="gpt"):
    paper = check(size, ("cpu", "paper"), "size") == "paper"
    dimension, num_points, sparsity = (20, 41, 3) if paper else (3, 7, 1)
    sparse = dict(name="sparse_linear", sparsity=sparsity)

    c = experiments.config(size, backbone, sparse, dimension, num_points, curriculum=2)
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
