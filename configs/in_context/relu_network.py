"""Two-layer ReLU networks learnt in context (Garg et al., NeurIPS 2022, figures 5c and 5d).

  python -m launch.train --config configs/in_context/relu_network.py --workdir runs/relu_network

`linear` are prompts of linear functions, which the network was not trained on. Arguments: the size, and the
backbone, see configs/in_context/experiments.py.
"""

from configs.arguments import check
from configs.in_context import experiments
from configs.in_context.experiments import baseline


def get_config(size="cpu", backbone="gpt"):
    paper = check(size, ("cpu", "paper"), "size") == "paper"
    dimension, num_points, hidden = (20, 101, 100) if paper else (2, 11, 4)
    relu_network = dict(name="relu_network", hidden=hidden)

    c = experiments.config(size, backbone, relu_network, dimension, num_points, curriculum=5)
    c.evaluators = dict(
        errors=experiments.errors(
            dimension,
            num_points,
            dict(standard=relu_network, linear=dict(name="linear")),
            # The released code's; the paper has 5000 steps on batches of 10.
            baselines=dict(
                trained_by_adam=baseline("network_gd", steps=100, lr=5e-3),
                least_squares=baseline("least_squares"),
                nearest_neighbors=baseline("knn", k=3),
            ),
            **({} if paper else dict(num_prompts=640)),
        )
    )
    return c
