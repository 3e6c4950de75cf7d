"""Every method of this folder on one problem, as stages of one run with one table.

  python -m launch.train --config configs/domain_generalization/compare.py:cpu,contexts --workdir runs/all
  python -m launch.model_selection runs/all

Arguments, in this order: the size; the problem: `irm` or `domainbed`, the builds of colored_mnist.py, or
`contexts` or `rotations`, the domains of contexts.py, with a stage for each method and held-out domain, which
model_selection reads; the trial.
"""

from ml_collections import ConfigDict

from configs.arguments import check
from configs.domain_generalization import colored_mnist, contexts, methods


def get_config(size="cpu", problem="irm", trial="0"):
    check(problem, ("irm", "domainbed", "contexts", "rotations"), "problem")
    c = ConfigDict(sort_keys=False)
    c.stages = ConfigDict(sort_keys=False)
    shared = ("seed", "seeds", "log_every", "checkpoint_every")
    for method in colored_mnist.METHODS if problem == "irm" else methods.METHODS:
        if problem in ("irm", "domainbed"):
            one = colored_mnist.get_config(size, method, problem, trial)
            stages = {method: {}}
        else:
            one = contexts.get_config(size, method, problem, trial)
            stages = {f"{method}_{domain}": stage for domain, stage in one.stages.items()}
        own = {key: value for key, value in one.items() if key not in (*shared, "stages")}
        for name, stage in stages.items():
            c.stages[name] = ConfigDict({**own, **stage}, sort_keys=False)
    c.update({key: one[key] for key in shared})
    # What a stage leaves out is taken from the top, where each key must be.
    c.update({key: one[key] for key in ("steps", "batch_size")})
    return c
