"""Noisy linear functions learnt in context, beside the Bayes estimator, ridge regression.

  python -m launch.train --config configs/in_context/noisy_linear.py --workdir runs/noisy_linear

Garg et al. (NeurIPS 2022) evaluate on such prompts, with σ² = d / 20, and do not train on them; here the
network is. `noise_free` is the error to the labels without noise, that of Raventós et al. (NeurIPS 2023).
Arguments: the size, and the backbone, see configs/in_context/experiments.py.
"""

from configs.arguments import check
from configs.in_context import experiments
from configs.in_context.experiments import baseline


def get_config(size="cpu", backbone="gpt"):
    paper = check(size, ("cpu", "paper"), "size") == "paper"
    dimension, num_points, noise_std = (20, 41, 1.0) if paper else (2, 9, 0.5)
    linear = dict(name="in_context.functions.linear")
    noisy = dict(name="noisy_linear", noise_std=noise_std)

    c = experiments.config(size, backbone, noisy, dimension, num_points, curriculum=2)
    c.evaluators = dict(
        errors=experiments.errors(
            dimension,
            num_points,
            dict(
                noisy=noisy,
                noise_free=dict(function=noisy, target=linear),
                twice_the_noise=dict(name="noisy_linear", noise_std=2 * noise_std),
                no_noise=linear,
            ),
            baselines=dict(
                bayes_ridge=baseline("bayes_ridge", sigma=noise_std),
                least_squares=baseline("least_squares"),
                averaging=baseline("averaging"),
                nearest_neighbors=baseline("knn", k=3),
            ),
        )
    )
    return c
