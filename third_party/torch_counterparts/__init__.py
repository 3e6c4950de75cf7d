"""Our methods once more as ordinary PyTorch scripts have them, for `launch.benchmark` to compare with.

Nothing here imports jaxlab: the process that is measured holds PyTorch and no JAX.

The contract: a file is a method, its name with underscores for dots (`supervised.erm`: `supervised_erm.py`).
It has one function, `make_update(config, network, batch, **keys) -> update`. `config` is the plain config of
an experiment, `keys` those of its method section, `network` a module from images [B, C, H, W] to logits
[B, K] that has its initial weights, and `batch` a first batch: {"image": [B, C, H, W], "label": [B], "index":
[B]}, with a second one under "auxiliary" where the method takes outliers; of environments, [E, n] for [B];
or, for in-context learning, {"xs": [B, K, d], "ys": [B, K]}, from which `network` makes predictions [B, K].
`update(batch)` makes one training step and returns its loss, a scalar tensor. What a config asks for and is
not written here raises `NoCounterpart`.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any


class NoCounterpart(Exception):
    """What a config asks for is not written in PyTorch here; the message says what."""


def call(
    functions: Mapping[str, Callable[..., Any]], section: Mapping[str, Any], *args: Any, **more: Any
) -> Any:
    """Calls the function that a section names with `args`, the section's other keys and `more`."""
    name, keys = section["name"], {key: value for key, value in section.items() if key != "name"}
    if name not in functions:
        raise NoCounterpart(f"no counterpart of {name}")
    try:
        inspect.signature(functions[name]).bind(*args, **keys, **more)
    except TypeError as error:
        raise NoCounterpart(f"no counterpart of {name} with {', '.join(keys)}: {error}") from error
    return functions[name](*args, **keys, **more)
