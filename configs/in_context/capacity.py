"""Size of the network against the dimension of the functions (Garg et al., NeurIPS 2022, section 6).

  python -m launch.train --config configs/in_context/capacity.py --workdir runs/capacity
  python -m launch.train --config configs/in_context/capacity.py:paper,gpt,small,20 --workdir runs/small20

A stage for each network and dimension, each of three seeds. Arguments: the size, and the backbone, see
configs/in_context/experiments.py; a network and a dimension, if not all of them.
"""

from ml_collections import ConfigDict

from configs.arguments import check
from configs.in_context import experiments
from configs.in_context.experiments import baseline, prompts

CPU_MODELS = {
    "one_layer": dict(n_embd=64, n_layer=1, n_head=4),
    "two_layers": dict(n_embd=64, n_layer=2, n_head=4),
    "three_layers": dict(n_embd=64, n_layer=3, n_head=4),
}


def get_config(size="cpu", backbone="gpt", model="all", dimension="all"):
    paper = check(size, ("cpu", "paper"), "size") == "paper"
    models = experiments.MODELS if paper else CPU_MODELS
    dimensions = ("10", "20", "30", "40", "50") if paper else ("1", "2")
    check(model, ("all", *models), "network")
    check(dimension, ("all", *dimensions), "dimension")

    c = experiments.settings(size, steps=2000, learning_rate=2e-3)
    c.seeds = 3
    c.stages = ConfigDict(sort_keys=False)
    for name in models if model == "all" else [model]:
        for d in map(int, dimensions if dimension == "all" else [dimension]):
            num_points = 2 * d + 1
            linear = dict(name="linear")
            kinds = dict(standard=linear)
            if paper:
                for shift in ("skewed", "half_subspace", "orthants"):
                    kinds[shift] = dict(function=linear, shift=prompts(shift))
            c.stages[f"{name}_{d}"] = dict(
                network=experiments.network(backbone, n_positions=max(101, num_points), **models[name]),
                data=experiments.stream(linear, d, num_points, curriculum=2 if paper else None),
                evaluators=dict(
                    errors=experiments.errors(
                        d, num_points, kinds, baselines=dict(least_squares=baseline("least_squares"))
                    )
                ),
            )
    return c
