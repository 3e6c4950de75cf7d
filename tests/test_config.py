"""A config file becomes plain dicts, and every ordinary mistake in it one line with its place."""

import json
import logging

import numpy as np
import pytest

from jaxlab import config as configs
from jaxlab import experiment
from jaxlab.core import UserError
from jaxlab.train.writers import ProgressLine
from tests.launch import runs

CHAIN = """    c.optimizer = dict(
        name="chain",
        args=[
            dict(name="add_decayed_weights", weight_decay=0.1),
            dict(name="sgd", learning_rate=dict(name="linear_schedule", init_value=0.1, end_value=0.0, transition_steps=9)),
        ],
    )
    return c"""
CHAINED = runs.CONFIG.replace("    return c", CHAIN)


def with_line(line, text=runs.CONFIG):
    """The config file with a line before its return."""
    return text.replace("    return c", f"    {line}\n    return c")


def load(tmp_path, text=runs.CONFIG, **overrides):
    return experiment.load_config(str(runs.write_config(tmp_path, text)), overrides)


def assert_refused(tmp_path, message, text, **overrides):
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path, text, **overrides)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("devices.data", "abc", r"config.devices.data: the mesh expects int, got 'abc'"),
        ("devices.data", "none", r"config.devices.data: the mesh expects int, got None"),
        ("devices.seed", "1.5", r"config.devices.seed: the mesh expects int, got 1.5"),
        ("devices", "{'seed': 1}", r"config.devices: the mesh misses 'data'"),
        ("seed", "99999999999999999999", r"config.seed: expected 2147483645 or less, got 9+\."),
        ("steps", "99999999999999999999", r"config.steps: expected 2147483647 or less"),
        (
            "optimizer.learning_rate",
            "1e999",
            r"config.optimizer.learning_rate: inf cannot be written to config.json",
        ),
        (
            "optimizer.learning_rate",
            "1j",
            r"config.optimizer.learning_rate: a value of type complex cannot be",
        ),
        ("network.hidden", "{8}", r"config.network.hidden: a value of type set cannot be"),
        ("network.hidden", "[8, b'8']", r"config.network.hidden.1: a value of type bytes cannot be"),
        ("network.hidden", "{1: 2}", r"config.network.hidden: 1 cannot be a key; keys are text"),
        ("network.hidden", "{[1]: 2}", r"config.network.hidden: mlp\(\) expects tuple.*, got '{\[1\]: 2}'"),
        ("network.hidden.x", "3", r"config.network.hidden.x: no such entry; config.network.hidden has 1"),
        (
            "network.num_classes.x",
            "3",
            r"config.network.num_classes: 2 is no section; set config.network.num_classes",
        ),
        ("method.name", "jaxlab.nn.mlp:mlp", r"config.method: mlp\(\) builds a Network, a method is needed"),
        (
            "network.name",
            "jaxlab.methods.supervised.erm:erm",
            r"config.network: erm\(\) builds a Method, a network is",
        ),
        (
            "optimizer",
            "{'name': 'constant_schedule', 'value': 1}",
            r"config.optimizer: .* builds a function, an optim",
        ),
        (
            "evaluators.test.name",
            "tests.toy:blobs",
            r"config.evaluators.test: blobs\(\) builds a Stream, an evaluator",
        ),
    ],
)
def test_a_wrong_override_is_named(tmp_path, key, value, message):
    assert_refused(tmp_path, message, runs.CONFIG, **{key: value})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "c.optimizer.learning_rate = float('nan')",
            r"config.optimizer.learning_rate: nan cannot be written",
        ),
        (
            "c.network.activation = abs",
            r"config.network.activation: a value of type builtin_function_or_method",
        ),
        (
            "import numpy; c.clip_norm = numpy.ones(2)",
            r"config.clip_norm: a value of type ndarray",
        ),
        ("c.devices = {1: 2}", r"config.devices: 1 cannot be a key"),
        ("c.stages = ['base']", r"config.stages: expected a section for each stage"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_key(tmp_path, line, message):
    assert_refused(tmp_path, message, with_line(line), seeds="1")


def test_numpy_scalars_become_numbers(tmp_path):
    config = load(
        tmp_path, with_line("import numpy; c.clip_norm = numpy.float32(0.5); c.max_to_keep = numpy.int64(7)")
    )
    assert json.loads(json.dumps(config)) == config
    assert (config["clip_norm"], config["max_to_keep"]) == (0.5, 7)
    assert configs.to_plain(np.bool_(True)) is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            runs.CONFIG.replace("return c", "pass"),
            r"config.py: get_config\(\) returned None; it returns a ConfigDict",
        ),
        (with_line("c.steps = nowhere"), r"config.py:21: NameError: name 'nowhere' is not defined\.$"),
        (with_line("c.nowhere.steps = 3"), r"config.py:21: AttributeError: "),
        (with_line("1 / 0"), r"config.py:21: ZeroDivisionError: division by zero\.$"),
        ("import numpy\n1 / 0\n", r"config.py:2: ZeroDivisionError"),
        ("\nimport nowhere_at_all\n", r"config.py:2: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("x = 1\ndef get_config(:\n", r"config.py:2: SyntaxError: "),
        ("import json\njson.loads('{')\n", r"config.py:2: JSONDecodeError: "),
        ("get_config = 3\n", r"config.py: a config file defines get_config"),
        ("def get_config(a, b): pass\n", r"config.py: TypeError: get_config\(\) missing 2 required"),
    ],
)
def test_a_file_that_fails_is_named_with_the_line(tmp_path, text, message):
    assert_refused(tmp_path, message, text)


def test_an_override_reaches_into_a_list(tmp_path):
    config = load(
        tmp_path, CHAINED, **{"optimizer.args.1.learning_rate.init_value": "0.2", "network.hidden.0": "4"}
    )
    assert config["optimizer"]["args"][1]["learning_rate"]["init_value"] == 0.2
    assert config["optimizer"]["args"][0]["weight_decay"] == 0.1
    assert config["network"]["hidden"] == [4]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "optimizer.args.2.learning_rate",
            r"config.optimizer.args.2: no such entry; config.optimizer.args has 2",
        ),
        ("optimizer.args.-1.learning_rate", r"config.optimizer.args.-1: no such entry"),
        ("optimizer.args.first", r"config.optimizer.args.first: no such entry"),
        (
            "optimizer.args.0.learning_rate",
            r"config.optimizer.args.0.learning_rate: add_decayed_weights\(\) takes no",
        ),
        ("optimizer.argz.0.learning_rate", r"config.optimizer.argz: no such section. Did you mean 'args'"),
    ],
)
def test_an_override_that_misses_a_list_is_named(tmp_path, key, message):
    assert_refused(tmp_path, message, CHAINED, **{key: "0.2"})


@pytest.mark.parametrize(
    "name", ["report", "plots", "checkpoints", "checkpoints.unreadable", "a/b", ".a", "", "-a"]
)
def test_a_stage_that_cannot_have_a_folder_is_refused(tmp_path, name):
    text = runs.CONFIG.replace("return c", f"return {{**c.to_dict(), 'stages': {{{name!r}: dict(steps=3)}}}}")
    assert_refused(tmp_path, f"config.stages: '{name}' cannot be a folder of the run", text)


@pytest.mark.parametrize("source", ["[1]", "3", "{'a': 1}"])
def test_a_stage_starts_from_a_name(tmp_path, source):
    message = "config.stages.tuned.init_from: expected the name of a stage, got "
    assert_refused(tmp_path, message, runs.STAGED, **{"stages.tuned.init_from": source})


def test_an_override_that_some_stages_shadow_is_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        config = load(tmp_path, runs.STAGED, **{"optimizer.learning_rate": "0.3", "seeds": "1"})
    assert caplog.messages == [
        "config.optimizer.learning_rate: stages tuned keep their own;"
        " set config.stages.tuned.optimizer.learning_rate for them."
    ]
    rates = {name: c["optimizer"]["learning_rate"] for name, c in configs.stage_configs(config).items()}
    assert rates == {"base": 0.3, "tuned": 0.0}


def test_a_function_that_refuses_its_arguments_is_named_with_its_place(tmp_path):
    text = with_line(
        'c.evaluators.test = dict(name="ood_detection.detection", dataset={}, ood={}, scores=["enrgy"])'
    )
    with pytest.raises(
        UserError, match=r"^config.evaluators.test: scores: no 'enrgy'. Did you mean 'energy'"
    ):
        experiment.build_parts(load(tmp_path, text))


def test_brackets_in_a_title_are_no_markup(capsys):
    ProgressLine("network.hidden=[wide],[/wide] :smile:", 0, 10).log(5, {"loss": [1.0]})
    assert capsys.readouterr().out.startswith("network.hidden=[wide],[/wide] :smile:  step 5/10  loss 1  ")


NETWORKS = runs.CONFIG.replace(
    "    return c",
    """    c.data = dict(name="streams.resident", dataset=dict(name="store.arrays", dataset="digits", split="train"))
    c.network = dict(name="mlp", num_classes=10, hidden=[8])
    c.evaluators = {}
    jtt = dict(name="debiasing.jtt", identification_network=c.network.to_dict(), upweight=5.0)
    jtt["dataset"] = c.data.dataset.to_dict()
    c.stages = ConfigDict(sort_keys=False)
    c.stages.jtt = dict(method=jtt, init_from=dict(identification_network="first"))
    c.stages.other = dict(steps=10)
    c.stages.first = dict(steps=20)
    return c""",
)


@pytest.mark.parametrize(
    ("init_from", "sources"),
    [
        ({"identification_network": "first"}, {"identification_network": "first"}),
        (
            {"identification_network": "first", "network": "first"},
            {"identification_network": "first", "network": "first"},
        ),
        (
            {"identification_network": "first", "network": "other"},
            {"identification_network": "first", "network": "other"},
        ),
    ],
)
def test_a_stage_runs_behind_all_that_its_networks_start_from(tmp_path, init_from, sources):
    config = load(tmp_path, NETWORKS, **{"stages.jtt.init_from": str(init_from)})
    assert configs.settings_of(configs.stage_configs(config)["jtt"], "jtt").sources == sources
    expected = [*dict.fromkeys(sources.values()), "jtt"]
    assert list(config["stages"]) == expected + [s for s in ("other", "first") if s not in expected]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"stages.jtt.init_from": "first"},
            r"config.stages.jtt.init_from: .*has several networks \(.*\); say which .*dict\(<network>='first'\)",
        ),
        (
            {"stages.jtt.init_from": "{}"},
            "config.stages.jtt.init_from: .*needs a trained 'identification_network': give init_from=dict",
        ),
        (
            {"stages.jtt.init_from.identification_network": "frist"},
            r"config.stages.jtt.init_from: no stage 'frist'. Did you mean 'first'\? Stages: jtt, other, first\.$",
        ),
        (
            {"stages.jtt.init_from.identification_network": "jtt"},
            r"config.stages.jtt.init_from: stages start from each other in a circle",
        ),
        (
            {"stages.first.init_from": "{'network': 'jtt'}"},
            r"config.stages.jtt.init_from: stages start from each other in a circle",
        ),
        (
            {"stages.jtt.init_from": "{'identification_netwrk': 'first'}"},
            r"config.stages.jtt.init_from: method 'debiasing.jtt' has no network 'identification_netwrk' to"
            r" start from. Did you mean 'identification_network'\? It has: .*identification_network",
        ),
        (
            {"stages.jtt.init_from": "{'dataset': 'first'}"},
            r"config.stages.jtt.init_from: method 'debiasing.jtt' has no network 'dataset'",
        ),
        (
            {"stages.other.init_from": "{'identification_network': 'first'}"},
            r"config.stages.other.init_from: method 'supervised.erm' has no network 'identification_network' to"
            r" start from. It has: network\.$",
        ),
        *(
            ({"stages.jtt.init_from.identification_network": value}, message)
            for value, message in (
                ("3", r"config.stages.jtt.init_from: expected the name of a stage, got 3\.$"),
                ("none", r"config.stages.jtt.init_from: expected the name of a stage, got None\.$"),
                (
                    "['first']",
                    r"config.stages.jtt.init_from: expected the name of a stage, got \['first'\]\.$",
                ),
                ("''", r"config.stages.jtt.init_from: expected the name of a stage, got ''\.$"),
            )
        ),
    ],
)
def test_a_network_that_cannot_start_from_a_stage_is_named(tmp_path, overrides, message):
    assert_refused(tmp_path, message, NETWORKS, **overrides)
