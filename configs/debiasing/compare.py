"""Every method of this folder on the same coloured digits, as stages of one run with one table.

  python -m launch.train --config configs/debiasing/compare.py --workdir runs/debiasing

Arguments, in this order: the size; the share of bias-conflicting training examples in percent; the data set,
mnist, fashion_mnist (both prepared, see colored_mnist.py) or digits, which needs no file.
"""

from ml_collections import ConfigDict

from configs.arguments import check
from configs.debiasing import colored_digits, colored_mnist, methods


def get_config(size="cpu", conflicting="1", dataset="mnist"):
    check(dataset, ("mnist", "fashion_mnist", "digits"), "data set")
    c = ConfigDict(sort_keys=False)
    c.stages = ConfigDict(sort_keys=False)
    for method in methods.METHODS:
        if dataset == "digits":
            one = colored_digits.get_config(size, method, conflicting)
        else:
            one = colored_mnist.get_config(size, method, conflicting, dataset)
        for name, stage in one.stages.items():
            c.stages[name] = ConfigDict({"data": one.data, **stage}, sort_keys=False)
    c.update({key: value for key, value in one.items() if key not in ("data", "stages")})
    return c
