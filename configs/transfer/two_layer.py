"""Errors of LP, FT and LP-FT in the two-layer linear model of Kumar et al. (ICLR 2022), Section 3.

  python -m launch.train --config configs/transfer/two_layer.py --workdir runs/two_layer

Its figure (plots/theory_ood_error.png) shows both predictions, over 20 seeds: from a better head, FT has a
lower error out of distribution; with better features LP beats FT, with worse ones FT beats LP. The crossover
is that of FT from a small random head.

Nothing is downloaded and both sizes are the same problem; `paper` has 200 seeds.
"""

from ml_collections import ConfigDict

from configs.arguments import check


def get_config(size="cpu"):
    check(size, ("cpu", "paper"), "size")
    qualities = dict(
        distances=[0.0, 0.05, 0.2, 0.35, 0.5, 0.75, 1.0],
        alphas=[0.0, 0.25, 0.5, 0.75, 0.9, 1.0],
        head_stds=[1.0, 0.1],
    )
    c = ConfigDict()
    c.seed = 0
    c.seeds = 20 if size == "cpu" else 200
    c.steps = 1  # trains each problem to the end
    c.batch_size = 1
    c.data = dict(name="transfer.theory.no_data")
    c.method = dict(name="transfer.theory", d=30, m=15, k=3, n=40, learning_rate=0.02, num_steps=4000)
    c.method.update(qualities)
    c.evaluators = dict(theory=dict(name="transfer.theory.errors", **qualities))
    return c
