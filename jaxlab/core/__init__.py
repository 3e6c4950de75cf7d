"""The ground floor: the contracts, names resolved to functions, errors. Imports nothing of jaxlab."""

from jaxlab.core.contracts import (
    Batch,
    Evaluator,
    Method,
    Network,
    Outputs,
    State,
    Stream,
    TrainedNetwork,
    Variables,
)
from jaxlab.core.errors import UserError
from jaxlab.core.resolve import build, resolve

__all__ = [
    "Batch",
    "Evaluator",
    "Method",
    "Network",
    "Outputs",
    "State",
    "Stream",
    "TrainedNetwork",
    "UserError",
    "Variables",
    "build",
    "resolve",
]
