"""How many tasks must be trained on until new ones are learnt in context (Raventós et al., NeurIPS 2023).

  python -m launch.train --config configs/in_context/task_diversity.py --workdir runs/task_diversity

A stage for each size of the pool that the weights of training are drawn from, and one without a pool. Each is
evaluated on tasks of its pool and on fresh ones, against the labels without noise. The discrete estimator
knows the pool and is the best there can be on its tasks, ridge regression is on fresh ones.
Arguments: the size, and the backbone, see configs/in_context/experiments.py.
"""

from ml_collections import ConfigDict

from configs.arguments import check
from configs.in_context import experiments
from configs.in_context.experiments import baseline


def get_config(size="cpu", backbone="gpt"):
    paper = check(size, ("cpu", "paper"), "size") == "paper"
    dimension, num_points, noise_std = (8, 16, 0.5) if paper else (2, 8, 0.5)
    model = dict(n_embd=128, n_layer=8, n_head=2) if paper else dict(n_embd=64, n_layer=2, n_head=4)
    pools = [2**power for power in (range(1, 21) if paper else (0, 2, 4, 6))]
    linear, noisy = dict(name="in_context.functions.linear"), dict(name="noisy_linear", noise_std=noise_std)

    c = experiments.settings(size, steps=2000, learning_rate=2e-3)
    c.network = experiments.network(backbone, n_positions=num_points, **model) | dict(layout="own")
    if paper:
        c.batch_size = 256
        c.steps = 500_000
        triangle = dict(
            name="join_schedules",
            schedules=[
                dict(name="linear_schedule", init_value=0.0, end_value=1e-3, transition_steps=250_000),
                dict(name="linear_schedule", init_value=1e-3, end_value=0.0, transition_steps=250_000),
            ],
            boundaries=[250_000],
        )
        c.optimizer = dict(name="adam", learning_rate=triangle)
    ridge = dict(ridge=baseline("bayes_ridge", sigma=noise_std))
    fresh = dict(function=noisy, target=linear)

    def stage(function, kinds, baselines):
        return dict(
            data=experiments.stream(function, dimension, num_points),
            evaluators=dict(errors=experiments.errors(dimension, num_points, kinds, baselines=baselines)),
        )

    c.stages = ConfigDict(sort_keys=False)
    for num_tasks in pools:
        pool = dict(name="task_pool", function=noisy, num_tasks=num_tasks)
        tasks = pool | dict(name="in_context.functions.pool_weights", dimension=dimension)
        discrete = dict(discrete=baseline("discrete_mmse", pool=tasks, sigma=noise_std))
        # Beyond, the estimator's memory is that of its prompts times that of its tasks.
        baselines = ridge | (discrete if num_tasks <= 2**15 else {})
        c.stages[f"tasks_{num_tasks}"] = stage(
            pool, dict(pool=dict(function=pool, target=linear), fresh=fresh), baselines
        )
    c.stages.unlimited = stage(noisy, dict(fresh=fresh), ridge)
    return c
