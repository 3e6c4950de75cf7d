"""From a name in a config to a function, and from a config section to what that function builds.

A name is a module path: `"debiasing.lff"` is the function `lff` of `jaxlab/methods/debiasing/lff.py`,
`"my_package.mine:build"` anyone's own function. Everything that can be wrong with a section is raised
here, before anything is compiled.
"""

import importlib
import importlib.util
import inspect
import numbers
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import optax

from jaxlab.core.contracts import Evaluator, Method, Network, Stream
from jaxlab.core.errors import UserError, nearest

# Where the names of each kind begin; the first package that has the name wins.
PACKAGES: dict[str, tuple[str, ...]] = {
    "data": ("jaxlab.data", "jaxlab.methods"),
    "network": ("jaxlab.nn", "jaxlab.methods"),
    "method": ("jaxlab.methods",),
    "optimizer": ("optax",),
    "evaluator": ("jaxlab.metrics", "jaxlab.methods"),
}

_CONTRACTS = {"network": Network, "method": Method, "evaluator": Evaluator}
# What a section of a kind must build. Data may be anything on the way to a stream.
_BUILT = {**_CONTRACTS, "optimizer": optax.GradientTransformation}


def resolve(kind: str, name: str, path: str | None = None) -> Callable[..., Any]:
    """Finds the function that `name` stands for.

    Args:
      kind: one of "data", "network", "method", "optimizer", "evaluator".
      name: a module path below the kind's package, the last part being the function (and the module
        too, where they share a name); or "package.module:function" for a function from anywhere.
      path: the place of the name in the config, for messages; `config.<kind>` if not given.

    Raises:
      UserError: there is no such function; the message has the nearest name.
    """
    path = path or f"config.{kind}"
    if kind not in PACKAGES:
        raise UserError(f"{path}: no kind '{kind}'.{nearest(kind, PACKAGES)} Kinds: {', '.join(PACKAGES)}.")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}.name: expected the name of a function, got {name!r}.")
    if ":" in name:
        return _resolve_anywhere(name, path)
    if all(part.isidentifier() for part in name.split(".")):
        for package in PACKAGES[kind]:
            function = _find(package, name)
            if function is not None:
                return function
    known = sorted({known for package in PACKAGES[kind] for known in _names(kind, package)})
    where = " or ".join(PACKAGES[kind])
    listing = f" It has: {', '.join(known)}." if len(known) <= 40 else ""
    raise UserError(f"{path}.name: no '{name}' under {where}.{nearest(name, known)}{listing}")


def _resolve_anywhere(name: str, path: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # it may be anyone's code
        raise UserError(
            f"{path}.name: cannot import '{module_name}' ({describe(error)}); is it on PYTHONPATH?"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        suggestion = nearest(attribute, _public_functions(module))
        raise UserError(f"{path}.name: '{module_name}' has no function '{attribute}'.{suggestion}")
    return function


def _find(package: str, name: str) -> Callable[..., Any] | None:
    """`a.b` is `b` in module `a.b`, or `b` in module `a`; a bare `b` may also be `package.b`."""
    *parents, last = name.split(".")
    for module_name in (".".join([package, *parents, last]), ".".join([package, *parents])):
        if _module_exists(module_name):
            function = getattr(importlib.import_module(module_name), last, None)
            if callable(function):
                return function
    return None


def _module_exists(module_name: str) -> bool:
    try:
        return importlib.util.find_spec(module_name) is not None
    except ModuleNotFoundError:  # a parent is missing, or is no package
        return False


def _names(kind: str, package: str) -> Iterable[str]:
    """The names that a user may write, for messages: what builds the kind, or a library's functions."""
    module = importlib.import_module(package)
    if not package.startswith("jaxlab."):
        yield from _public_functions(module)
        return
    # Of data, a problem's folder has streams; `jaxlab.data` has what is on the way to one, too.
    expected = Stream if (kind, package) == ("data", "jaxlab.methods") else _CONTRACTS.get(kind)
    for info in pkgutil.walk_packages(module.__path__, package + "."):
        if not info.ispkg:
            relative = info.name.removeprefix(package + ".")
            module = importlib.import_module(info.name)
            for function in _public_functions(module):
                returns = type_hints(getattr(module, function)).get("return")
                if expected in (None, returns):
                    yield relative if relative.split(".")[-1] == function else f"{relative}.{function}"


def _public_functions(module: types.ModuleType) -> list[str]:
    def is_own(function: types.FunctionType) -> bool:
        return function.__module__ == module.__name__ or not module.__name__.startswith("jaxlab")

    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith("_") and is_own(value)
    ]


class Plan(NamedTuple):
    """A checked call that has not been made.

    Attributes:
      function: what to call.
      arguments: its keyword arguments, which may be plans too.
      path: the place of the section in the config, for messages.
      kind: what the call must build, a key of `PACKAGES`; None: anything.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    path: str = "config"
    kind: str | None = None


def build(kind: str, section: Mapping[str, Any], path: str | None = None, **context: Any) -> Any:
    """Builds what a config section describes: resolves its `name`, calls it with its other keys.

    A nested section (a mapping with a `name`), also inside a list or a mapping, is built first. Its kind
    is the one its key ends with (`biased_network`), or its name is looked for in the parent's own module,
    in the module beside it called like the key, or like that of the mapping around it (`score` or `scores`:
    `scores.py`), then in every kind.

    Args:
      kind: as for `resolve`.
      section: a mapping with `name` and keyword arguments.
      path: the place of the section in the config, for messages; `config.<kind>` if not given.
      **context: values for parameters that the section leaves out, of the function and of nested ones,
        where the parameter has no default or the default None: another default is the function's choice.

    Raises:
      UserError: unknown name or key, missing key, a value of the wrong type or that the function fails on,
        or a function that builds something else (at the top, the kind "data" means a stream).
    """
    return execute(plan(kind, section, path, **context))


def plan(kind: str, section: Mapping[str, Any], path: str | None = None, **context: Any) -> Plan:
    """Checks a section as `build` does, names, keys and types, without calling anything."""
    path = path or f"config.{kind}"
    if not isinstance(section, Mapping) or "name" not in section:
        raise UserError(f"{path}: expected a section with a 'name', got {section!r}.")
    return _plan_section(resolve(kind, section["name"], path), section, path, context, kind)


def check_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], path: str, called: str, **context: Any
) -> dict[str, Any]:
    """Checks keyword arguments against a function's signature and type hints.

    Args:
      function: what will take them.
      arguments: by name; plans stand for what they will build.
      path: where they stand in the config, for messages.
      called: what takes them, for messages.
      **context: values for parameters that are not among the arguments and have no default but None.

    Returns:
      The arguments, with those of the context that the function takes.

    Raises:
      UserError: unknown or missing key, or a value of the wrong type.
    """
    parameters = inspect.signature(function).parameters
    hints = type_hints(function)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    filled = {
        key for key, p in parameters.items() if key in context and (p.default is p.empty or p.default is None)
    }
    takes = [name for name, p in parameters.items() if name not in filled and p.kind is not p.VAR_KEYWORD]
    signature = f"It takes: {', '.join(takes)}." if takes else "It takes no keys."
    for key, value in arguments.items():
        if key not in parameters and not open_ended:
            raise UserError(f"{path}.{key}: {called} takes no '{key}'.{nearest(key, takes)} {signature}")
        hint = hints.get(key, Any)
        if key in parameters and parameters[key].kind is inspect.Parameter.VAR_POSITIONAL:
            hint = tuple[hint, ...]
        if not _matches(value, hint):
            raise UserError(f"{path}.{key}: {called} expects {_spell(hint)}, got {value!r}.")
    complete = dict(arguments)
    for key, parameter in parameters.items():
        if key in complete or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if key in filled:
            complete[key] = context[key]
        elif parameter.default is parameter.empty:
            raise UserError(f"{path}: {called} misses '{key}'. {signature}")
    return complete


def _plan_section(
    function: Callable[..., Any], section: Mapping[str, Any], path: str, context: dict, kind: str | None
) -> Plan:
    _check_built(function, kind, path, type_hints(function).get("return", Any))
    arguments = {
        key: _plan_nested(section[key], key, function, f"{path}.{key}", context)
        for key in section
        if key != "name"
    }
    arguments = check_arguments(function, arguments, path, _called(function), **context)
    return Plan(function, arguments, path, kind)


def _plan_nested(
    value: Any, key: str, parent: Callable[..., Any], path: str, context: dict, around: str = ""
) -> Any:
    """`around` is the key of the mapping that `value` stands in, which is no section."""
    if isinstance(value, Mapping):
        if "name" in value:
            kind = next((kind for kind in PACKAGES if key == kind or key.endswith("_" + kind)), None)
            name = value["name"]
            keys = (around, key) if around else (key,)
            function = resolve(kind, name, path) if kind else _resolve_nested(name, keys, parent, path)
            return _plan_section(function, value, path, context, None if kind == "data" else kind)
        return {k: _plan_nested(value[k], k, parent, f"{path}.{k}", context, key) for k in value}
    if isinstance(value, (list, tuple)):
        return tuple(_plan_nested(v, key, parent, f"{path}.{i}", context) for i, v in enumerate(value))
    return value


def _resolve_nested(
    name: Any, keys: Sequence[str], parent: Callable[..., Any], path: str
) -> Callable[..., Any]:
    if isinstance(name, str) and ":" not in name and not parent.__module__.startswith("optax"):
        beside = parent.__module__.rpartition(".")[0]
        places = [f"{beside}.{key}{plural}" for key in keys for plural in ("", "s")]
        for module_name in (parent.__module__, *places):
            if _module_exists(module_name):
                function = getattr(importlib.import_module(module_name), name, None)
                if callable(function):
                    return function
    home = next((k for k, packages in PACKAGES.items() if parent.__module__.startswith(packages)), "data")
    for kind in (home, *PACKAGES):
        try:
            return resolve(kind, name, path)
        except UserError:
            continue
    return resolve("data" if home in ("evaluator", "method") else home, name, path)  # raises, with the names


def execute(value: Any) -> Any:
    """Makes the calls of a plan, innermost first; a value that is no plan is returned as it is.

    Raises:
      UserError: a call failed, or did not build what its kind needs; the message begins with its place.
    """
    if isinstance(value, Plan):
        function = value.function
        parameters = inspect.signature(function).parameters
        positional = [name for name, p in parameters.items() if p.kind is p.VAR_POSITIONAL]
        arguments = {key: execute(argument) for key, argument in value.arguments.items()}
        try:
            built = function(*[v for key in positional for v in arguments.pop(key, ())], **arguments)
        except UserError as error:
            raise UserError(f"{value.path}: {error}") from error
        except Exception as error:
            raise UserError(f"{value.path}: {_called(function)} failed: {describe(error)}.") from error
        _check_built(function, value.kind, value.path, type(built))
        return built
    if type(value) is dict:
        return {key: execute(v) for key, v in value.items()}
    if type(value) is tuple:
        return tuple(execute(v) for v in value)
    return value


def describe(error: Exception) -> str:
    """An error in one line: its type and its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(" :.")


def _called(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__name__', type(function).__name__)}()"


def _check_built(function: Callable[..., Any], kind: str | None, path: str, built: Any) -> None:
    """Refuses what does not fit the kind; `built` is a type, or a return annotation that may say little."""
    origin = typing.get_origin(built) or built
    unclear = not inspect.isclass(origin) or origin in (Any, typing.Union, types.UnionType)
    if kind not in _BUILT or unclear or issubclass(origin, _BUILT[kind]):
        return
    raise UserError(f"{path}: {_called(function)} builds {_a(_spell(built))}, {_a(kind)} is needed.")


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOUaeiou' else 'a'} {noun}"


def type_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The type hints of a function; {} where they cannot be evaluated."""
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # a name that exists only for type checkers, or no plain function
        return {}


def _matches(value: Any, hint: Any) -> bool:
    """Whether a config value may stand where `hint` is asked for; what cannot be judged passes."""
    origin = typing.get_origin(hint)
    if isinstance(value, Plan) or hint is Any or isinstance(hint, (str, typing.TypeVar)):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is None or hint is types.NoneType:
        return value is None
    kind = origin or hint
    if not inspect.isclass(kind):
        return True
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    if kind in (tuple, list, Sequence):
        element = (typing.get_args(hint) or (Any,))[0]
        return isinstance(value, (tuple, list)) and all(_matches(v, element) for v in value)
    if kind is Callable:
        return callable(value)
    # What is left are arrays and contracts: a number may be an array, a string or None never is either.
    return value is not None and not isinstance(value, str)


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_spell(option) for option in typing.get_args(hint)))
    if typing.get_origin(hint) is Callable:
        return "function"
    if inspect.isclass(hint) and not typing.get_origin(hint):
        library = hint.__module__.split(".")[0]
        numeric = library in ("numpy", "jax", "jaxlib") or hint in (complex, numbers.Number)
        return "array" if numeric else {"NoneType": "None"}.get(hint.__name__, hint.__name__)
    return str(hint)
