"""Decision trees learnt in context (Garg et al., NeurIPS 2022, figure 5b), beside greedy and boosted trees.

  python -m launch.train --config configs/in_context/decision_tree.py --workdir runs/decision_tree

The trees of scikit-learn are fitted on the host to every prefix of every prompt: boosted ones take 20 to 50
ms each, and are evaluated on fewer prompts. Those on the signs of the inputs are in the paper only.
Arguments: the size, and the backbone, see configs/in_context/experiments.py.
"""

from configs.arguments import check
from configs.in_context import experiments
from configs.in_context.experiments import baseline


def get_config(size="cpu", backbone="gpt"):
    paper = check(size, ("cpu", "paper"), "size") == "paper"
    dimension, num_points, depth = (20, 101, 4) if paper else (2, 16, 2)
    tree = dict(name="decision_tree", depth=depth)

    def errors(num_prompts, baselines):
        kinds = dict(tree=tree)
        return experiments.errors(dimension, num_points, kinds, num_prompts=num_prompts, baselines=baselines)

    c = experiments.config(size, backbone, tree, dimension, num_points, curriculum=5)
    c.evaluators = dict(
        errors=errors(
            1280,
            dict(
                greedy_tree=baseline("greedy_tree", max_depth=2),
                greedy_tree_on_signs=baseline("greedy_tree", max_depth=depth, sign=True),
                least_squares=baseline("least_squares"),
                nearest_neighbors=baseline("knn", k=3),
            ),
        ),
        boosted=errors(
            128 if paper else 32,
            dict(boosted_trees=baseline("boosting"), boosted_trees_on_signs=baseline("boosting", sign=True)),
        ),
    )
    return c
