"""Names become functions and sections become what they build; every mistake is one clear line."""

from typing import Literal, NamedTuple

import optax
import pytest

from jaxlab.core import UserError, build, resolve
from jaxlab.core.resolve import plan


class Built(NamedTuple):
    arguments: dict


def part(
    q: float,
    ema: bool = True,
    widths: tuple[int, ...] = (1,),
    kind: Literal["a", "b"] = "a",
    inner: object = None,
    network: object = None,
    limit: int | None = None,
):
    return Built(locals())


def inner(x: int = 0, batch_size: int = 1):
    return ("inner", x, batch_size)


def collect(*args: tuple, name_of_all: str = ""):
    return Built({"args": args})


HERE = f"{__name__}:"


def test_a_name_is_a_module_path():
    from jaxlab.methods.supervised import erm
    from jaxlab.nn import mlp

    assert resolve("method", "supervised.erm") is erm.erm
    assert resolve("network", "mlp") is mlp.mlp
    assert resolve("optimizer", "cosine_decay_schedule") is optax.cosine_decay_schedule
    assert resolve("method", HERE + "part") is part


def test_nested_sections_are_built_first_wherever_they_stand():
    section = dict(name=HERE + "part", q=1, inner={"deep": [dict(name="inner", x=3)]})
    assert build("method", section, batch_size=7).arguments["inner"] == {"deep": (("inner", 3, 7),)}


def test_a_schedule_stands_inside_an_optimizer_and_optimizers_inside_a_chain():
    schedule = dict(name="linear_schedule", init_value=0.0, end_value=1.0, transition_steps=10)
    sgd = dict(name="sgd", learning_rate=schedule, momentum=0.9)
    built = build("optimizer", dict(name="chain", args=[dict(name="clip", max_delta=1.0), sgd]))
    assert isinstance(built, optax.GradientTransformation)


def test_the_context_fills_what_a_section_leaves_out_and_nothing_else():
    section = dict(name=HERE + "part", q=0.5)
    arguments = build("method", section, network="net", q=9.0, unknown=1).arguments
    assert (arguments["q"], arguments["network"]) == (0.5, "net")


def test_positional_parameters_take_a_list():
    assert build("method", dict(name=HERE + "collect", args=[[1], [2]])).arguments["args"] == ((1,), (2,))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            dict(name="supervised.ermm"),
            "config.method.name: no 'supervised.ermm'.*Did you mean 'supervised.erm'",
        ),
        (dict(name="tests.core.nowhere:part"), "cannot import|failed"),
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
        (
            dict(name=HERE + "part", q=1, inner=dict(name="inner", y=1)),
            "config.method.inner.y: inner.. takes no",
        ),
        (dict(name=HERE + "part", q=1, inner=[dict(name="inner", y=1)]), r"config.method.inner\[0\].y"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_its_mend(section, message):
    with pytest.raises(UserError, match=message) as raised:
        plan("method", section)
    assert "\n" not in str(raised.value)


def test_a_whole_number_is_a_float_and_none_may_stand_where_it_is_allowed():
    assert build("method", dict(name=HERE + "part", q=1, limit=None)).arguments["q"] == 1


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
