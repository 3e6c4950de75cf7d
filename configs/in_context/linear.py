"""Linear functions learnt in context (Garg et al., NeurIPS 2022), and every prompt shift of the paper.

  python -m launch.train --config configs/in_context/linear.py --workdir runs/linear

Arguments: the size, and the backbone, see configs/in_context/experiments.py.
"""

from configs.arguments import check
from configs.in_context import experiments
from configs.in_context.experiments import baseline, prompts

FACTORS = {"third": 1 / 3, "half": 0.5, "two": 2.0, "three": 3.0}


def get_config(size="cpu", backbone="gpt"):
    paper = check(size, ("cpu", "paper"), "size") == "paper"
    dimension, num_points = (20, 41) if paper else (2, 5)
    linear = dict(name="linear")
    baselines = dict(
        least_squares=baseline("least_squares"),
        averaging=baseline("averaging"),
        nearest_neighbors=baseline("knn", k=3),
    )

    def errors(kinds):
        return experiments.errors(dimension, num_points, kinds, baselines=baselines)

    def shifted(name, **keys):
        return dict(function=linear, shift=prompts(name)) | keys

    def scaled(factor):
        return shifted("scale_x", normalizer=factor**2 * dimension) | dict(
            shift=prompts("scale_x", factor=factor)
        )

    c = experiments.config(
        size, backbone, linear, dimension, num_points, curriculum=2, n_positions=2 * num_points
    )
    c.evaluators = dict(
        standard=errors(dict(standard=linear)),
        shifts=errors(
            dict(
                skewed=shifted("skewed"),
                half_subspace=shifted("half_subspace"),
                noisy=dict(name="noisy_linear", renormalize=True),
                different_orthants=shifted("orthants"),
                orthogonal_query=shifted("orthogonal_query", num_points=dimension),
                query_is_example=shifted("query_is_example"),
            )
        ),
        scales=errors(
            {f"inputs_times_{name}": scaled(factor) for name, factor in FACTORS.items()}
            | {f"weights_times_{name}": dict(name="linear", scale=factor) for name, factor in FACTORS.items()}
        ),
        query_scales=errors(
            {
                f"query_times_{name}": dict(
                    function=linear,
                    shift=prompts("scale_query", factor=factor),
                    normalizer=factor**2 * dimension,
                )
                for name, factor in {"sixteenth": 1 / 16, "quarter": 0.25, **FACTORS}.items()
            }
        ),
        longer=errors(
            dict(
                longer=dict(
                    function=linear, num_points=num_points + num_points // 2, trained_points=num_points
                )
            )
        ),
        algorithms=dict(
            name="in_context.evaluation.algorithm_distance",
            function=linear,
            dimension=dimension,
            num_points=num_points,
            algorithms=dict(
                least_squares=baseline("least_squares"),
                averaging=baseline("averaging"),
                gradient_descent=baseline("gradient_descent", steps=1, lr=0.5),
                newton=baseline("newton", steps=3),
            ),
        ),
    )
    return c
