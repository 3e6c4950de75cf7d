"""The ground floor: the contracts, names resolved to functions, errors. Imports nothing of jaxlab."""

from jaxlab.core.contracts import Batch, Evaluator, Method, Network, Outputs, State, Stream, Variables
from jaxlab.core.errors import UserError

__all__ = ["Batch", "Evaluator", "Method", "Network", "Outputs", "State", "Stream", "UserError", "Variables"]
