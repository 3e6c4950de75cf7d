"""Names become functions and sections become what they build; every mistake is one clear line."""

from collections.abc import Callable
from typing import Any, Literal

import optax
import pytest

from jaxlab.core import Method, Network, UserError, build, resolve
from jaxlab.core.resolve import plan


def part(
    q: float,
    ema: bool = True,
    widths: tuple[int, ...] = (1,),
    kind: Literal["a", "b"] = "a",
    inner: object = None,
    network: object = None,
    limit: int | None = None,
):
    return Method(locals(), None, None)


def inner(batch_size: int, x: int = 0):
    return ("inner", x, batch_size)


def attack(*, epsilon: float, steps: int = 10, data_dir: str | None = None):
    return (epsilon, steps, data_dir)


def collect(*args: tuple, name_of_all: str = ""):
    return Method({"args": args}, None, None)


def failing(divisor: int):
    if divisor < 0:
        raise UserError("divisor: expected 1 or more.")
    return Method(1 / divisor, None, None)


def network() -> Network:
    raise AssertionError("called")


def anything() -> Any:
    return {}


def schedule() -> Callable[[int], float]:
    raise AssertionError("called")


def columns() -> dict[str, int]:
    raise AssertionError("called")


HERE = f"{__name__}:"


def arguments(section, **context):
    """What the function `part` or `collect` of a section was called with."""
    return build("method", section, **context).init


def test_a_name_is_a_module_path():
    from jaxlab.methods.supervised import erm
    from jaxlab.nn import mlp

    assert resolve("method", "supervised.erm") is erm.erm
    assert resolve("network", "mlp") is mlp.mlp
    assert resolve("optimizer", "cosine_decay_schedule") is optax.cosine_decay_schedule
    assert resolve("method", HERE + "part") is part


def test_nested_sections_are_built_first_wherever_they_stand():
    section = dict(name=HERE + "part", q=1, inner={"deep": [dict(name="inner", x=3)]})
    assert arguments(section, batch_size=7)["inner"] == {"deep": (("inner", 3, 7),)}


def test_a_schedule_stands_inside_an_optimizer_and_optimizers_inside_a_chain():
    schedule = dict(name="linear_schedule", init_value=0.0, end_value=1.0, transition_steps=10)
    sgd = dict(name="sgd", learning_rate=schedule, momentum=0.9)
    built = build("optimizer", dict(name="chain", args=[dict(name="clip", max_delta=1.0), sgd]))
    assert isinstance(built, optax.GradientTransformation)


def test_the_context_fills_what_a_section_leaves_out_and_nothing_else():
    section = dict(name=HERE + "part", q=0.5)
    built = arguments(section, network="net", q=9.0, unknown=1)
    assert (built["q"], built["network"]) == (0.5, "net")


def test_the_context_overrules_no_default_but_none():
    section = dict(name=HERE + "part", q=1, inner=dict(name="attack", epsilon=0.3))
    built = arguments(section, steps=9000, data_dir="here", ema=False)
    assert (built["inner"], built["ema"]) == ((0.3, 10, "here"), True)
    section["inner"]["steps_"] = 3
    with pytest.raises(UserError, match=r"attack\(\) takes no 'steps_'. Did you mean 'steps'"):
        plan("method", section, steps=9000)


def test_positional_parameters_take_a_list():
    assert arguments(dict(name=HERE + "collect", args=[[1], [2]]))["args"] == ((1,), (2,))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            dict(name="supervised.ermm"),
            "config.method.name: no 'supervised.ermm'.*Did you mean 'supervised.erm'",
        ),
        (dict(name="tests.core.nowhere:part"), r"cannot import 'tests.core.nowhere' \(ModuleNotFoundError: "),
        (dict(name="no_such_package_at_all:part"), "cannot import 'no_such_package_at_all'"),
        (dict(name=HERE + "parts"), "no function 'parts'. Did you mean 'part'"),
        (dict(name=3), "expected the name of a function, got 3"),
        (dict(q=1), "expected a section with a 'name'"),
        ("erm", "expected a section with a 'name'"),
        (
            dict(name=HERE + "part", qq=1),
            r"config.method.qq: part\(\) takes no 'qq'. Did you mean 'q'\? It takes: q, ema,",
        ),
        (dict(name=HERE + "part"), r"config.method: part\(\) misses 'q'. It takes: q, ema"),
        (dict(name=HERE + "part", q="high"), "config.method.q: .* expects float, got 'high'"),
        (dict(name=HERE + "part", q=True), "config.method.q: .* expects float, got True"),
        (dict(name=HERE + "part", q=1, ema=1), "config.method.ema: .* expects bool, got 1"),
        (dict(name=HERE + "part", q=1, widths=[1, "a"]), "config.method.widths"),
        (dict(name=HERE + "part", q=1, widths=3), "config.method.widths"),
        (dict(name=HERE + "part", q=1, kind="c"), "expects 'a' or 'b', got 'c'"),
        (dict(name=HERE + "part", q=1, limit=1.5), "expects int or None, got 1.5"),
        (dict(name=HERE + "network"), r"config.method: network\(\) builds a Network, a method is needed\."),
        (
            dict(name=HERE + "part", q=1, network=dict(name="classification")),
            "config.method.network.name: no 'cl",
        ),
        (
            dict(name=HERE + "part", q=1, inner_method=dict(name=HERE + "network")),
            r"config.method.inner_method: network\(\) builds a Network, a method is needed\.",
        ),
        (
            dict(name=HERE + "part", q=1, inner=dict(name="inner", y=1)),
            "config.method.inner.y: inner.. takes no",
        ),
        (dict(name=HERE + "part", q=1, inner=[dict(name="inner", y=1)]), r"config.method.inner.0.y"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_its_mend(section, message):
    with pytest.raises(UserError, match=message) as raised:
        plan("method", section)
    assert "\n" not in str(raised.value)


def test_a_whole_number_is_a_float_and_none_may_stand_where_it_is_allowed():
    assert arguments(dict(name=HERE + "part", q=1, limit=None))["q"] == 1


def test_a_wrong_optimizer_value_is_found_in_a_union_of_types():
    with pytest.raises(UserError, match=r"config.optimizer.learning_rate: sgd\(\) expects float or array or"):
        plan("optimizer", dict(name="sgd", learning_rate="fast"))


def test_planning_calls_nothing():
    plan("method", dict(name=f"{__name__}:_explode"))


def _explode():
    raise AssertionError("called")


def test_an_unknown_kind_lists_the_kinds():
    with pytest.raises(UserError, match=r"no kind .networks.\. Did you mean .network."):
        resolve("networks", "mlp")


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("network", "anything", r"config.network: anything\(\) builds a dict, a network is needed"),
        ("method", "anything", r"config.method: anything\(\) builds a dict, a method is needed"),
        ("evaluator", "columns", r"config.evaluator: columns\(\) builds a dict.*, an evaluator is needed"),
        (
            "optimizer",
            "schedule",
            r"config.optimizer: schedule\(\) builds a function, an optimizer is needed",
        ),
        ("optimizer", "anything", r"config.optimizer: anything\(\) builds a dict, an optimizer is needed"),
    ],
)
def test_what_is_built_must_be_of_the_kind(kind, name, message):
    with pytest.raises(UserError, match=message):
        build(kind, dict(name=HERE + name))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(name=HERE + "failing", divisor=-1), r"config.method: divisor: expected 1 or more\."),
        (
            dict(name=HERE + "failing", divisor=0),
            r"config.method: failing\(\) failed: ZeroDivisionError: division",
        ),
        (
            dict(name=HERE + "part", q=1, inner=[dict(name="failing", divisor=0)]),
            r"config.method.inner.0: failing\(\) failed: ZeroDivisionError",
        ),
    ],
)
def test_a_function_that_fails_is_named_with_its_place(section, message):
    with pytest.raises(UserError, match="^" + message) as raised:
        build("method", section)
    assert raised.value.__cause__ is not None
