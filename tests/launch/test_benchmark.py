"""What the benchmark reports is coherent, and PyTorch does the same work as we do."""

import importlib
import importlib.util
import json

import jax
import numpy as np
import pytest

from jaxlab import config as configs
from jaxlab import experiment
from jaxlab.core import UserError
from launch import benchmark
from launch.worker import Worker, WorkerDied

QUICK = ["--seconds", "0.05", "--rounds", "2"]

TOY = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dict(
        method=dict(name="supervised.erm"),
        network=dict(name="mlp", num_classes=2, hidden=[4]),
        optimizer=dict(name="sgd", learning_rate=0.1),
        data=dict(name="tests.toy:blobs"),
        devices=dict(seed=1, data=1),
        steps=10, batch_size=8, seeds=3, log_every=4,
    ))
"""

STAGES = """
from ml_collections import ConfigDict

def get_config():
    standardize = dict(name="transforms.standardize", scale=16.0, mean=[0.3], std=[0.4])
    noise = dict(name="tests.launch.test_benchmark:noise", count=40)
    main = dict(name="streams.resident", dataset=noise, transforms=[standardize])
    outliers = dict(
        name="streams.resident",
        dataset=dict(name="outliers.uniform_noise", dataset=noise, count=50, maximum=16),
        batch_size=12,
        transforms=[standardize],
    )
    with_outliers = dict(name="streams.with_auxiliary", stream=main, auxiliary=outliers)
    decay = dict(name="add_decayed_weights", weight_decay=0.01)
    cosine = dict(name="jaxlab.methods.ood_detection.energy:cosine_schedule", init_value=0.1, decay_steps=10)
    sgd = dict(name="sgd", learning_rate=cosine, momentum=0.9, nesterov=True)
    config = ConfigDict(dict(
        network=dict(name="mlp", num_classes=10, hidden=[16], norm="batch_norm"),
        optimizer=dict(name="chain", args=[decay, sgd]),
        devices=dict(seed=1, data=1),
        steps=10, batch_size=8, seeds=2,
    ))
    config.stages = dict(
        erm=dict(method=dict(name="supervised.erm"), data=main),
        energy=dict(
            method=dict(name="ood_detection.energy.fine_tune"), data=with_outliers, init_from="erm"
        ),
        exposure=dict(
            method=dict(name="ood_detection.energy.fine_tune", auxiliary_loss="outlier_exposure"),
            data=with_outliers,
        ),
    )
    return config
"""


def noise(count: int) -> dict[str, np.ndarray]:
    """A data set that a config can name."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 17, (count, 8, 8, 2), dtype=np.uint8)
    return {"image": image, "label": rng.integers(0, 10, count, dtype=np.int32)}


@pytest.fixture
def toy_file(tmp_path):
    path = tmp_path / "toy_config.py"
    path.write_text(TOY)
    return str(path)


@pytest.fixture
def stages_file(tmp_path):
    path = tmp_path / "stages_config.py"
    path.write_text(STAGES)
    return str(path)


def measure(arguments, tmp_path):
    out = tmp_path / "speed.json"
    assert benchmark.main([*arguments, *QUICK, "--out", str(out)]) == 0
    return json.loads(out.read_text())["benchmarks"]


def check_program(figures, seeds, batch_size, flops):
    rate = figures["steps_per_second"]
    assert len(rate["values"]) == 2
    assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    examples = figures["examples_per_second"]["values"]
    np.testing.assert_allclose(examples, np.multiply(rate["values"], seeds * batch_size))
    np.testing.assert_allclose(
        figures["seconds_per_step_and_seed"]["values"], 1 / np.multiply(rate["values"], seeds)
    )
    assert 0 < figures["flop_share"]["median"] < 1
    assert figures["memory_bytes"] is None or figures["memory_bytes"] > 1e7
    assert figures["device_bytes"] is None
    assert flops > 0


def test_a_config_that_torch_has_no_counterpart_of_is_measured_alone(toy_file, tmp_path, capsys):
    (figures,) = measure([toy_file, "--against", "torch"], tmp_path)
    check_program(figures["ours"], 3, 8, figures["flops_per_step"])
    assert 0 < figures["ours"]["compile_seconds"] < figures["ours"]["start_seconds"]
    assert figures["ours"]["environment"]["backend"] == "cpu"
    assert figures["torch"] is figures["torch_compile"] is None
    reason = "no counterpart of tests.toy:blobs"
    if importlib.util.find_spec("torch") is None:
        reason = "torch is not installed; pip install -e .[torch]"
    assert figures["missing"] == reason
    printed = capsys.readouterr().out
    assert f"not measured against torch: {reason}\n" in printed
    assert "toy_config" in printed
    assert "steps/s" in printed


def test_torch_is_measured_in_the_same_rounds(stages_file, tmp_path, capsys):
    pytest.importorskip("torch")
    arguments = [stages_file, "--against", "torch", "--stage", "erm"]
    (figures,) = measure(arguments, tmp_path)
    assert (figures["stage"], figures["seeds"], figures["missing"]) == ("erm", 2, None)
    for program in ("ours", "torch"):
        check_program(figures[program], 2, 8, figures["flops_per_step"])
    rates = [figures[program]["steps_per_second"]["values"] for program in ("ours", "torch")]
    assert "ratio" not in figures["ours"]
    assert figures["torch_compile"] is None
    np.testing.assert_allclose(figures["torch"]["ratio"]["values"], np.divide(*rates))
    np.testing.assert_allclose(
        figures["torch"]["flop_share"]["values"],
        figures["flops_per_step"] * np.divide(rates[1], figures["product_flops_per_second"]["values"]),
    )
    assert "stages_config · erm" in capsys.readouterr().out


@pytest.mark.slow  # TorchInductor calls a C++ compiler
def test_the_compiled_counterpart_is_measured_beside_the_plain_one(stages_file, tmp_path, capsys):
    pytest.importorskip("torch")
    (figures,) = measure([stages_file, "--against", "both", "--stage", "erm"], tmp_path)
    rates = {name: figures[name]["steps_per_second"]["values"] for name in ("ours", "torch", "torch_compile")}
    for name in ("torch", "torch_compile"):
        np.testing.assert_allclose(figures[name]["ratio"]["values"], np.divide(rates["ours"], rates[name]))
    assert figures["torch"]["compile_seconds"] is None
    assert figures["torch_compile"]["compile_seconds"] > 1
    assert "torch.compile" in capsys.readouterr().out


def test_a_network_to_be_compiled_has_the_parameters_of_the_plain_one():
    pytest.importorskip("torch")
    from third_party.torch_counterparts.networks import make_network

    section = dict(name="mlp", num_classes=3, hidden=[4])
    plain, compiled = (make_network(section | more, (1, 2, 2)) for more in ({}, {"compile": True}))
    assert list(plain.state_dict()) == list(compiled.state_dict())
    assert plain._compiled_call_impl is None
    assert compiled._compiled_call_impl is not None


def test_the_counterpart_takes_outliers_from_a_stream_of_their_own(stages_file, tmp_path):
    torch = pytest.importorskip("torch")
    from third_party.torch_counterparts.__main__ import make_step
    from third_party.torch_counterparts.data import make_sample

    config = configs.stage_configs(experiment.load_config(stages_file))["energy"]
    data = benchmark._save_datasets(config["data"], None, tmp_path)
    batch = make_sample(data, batch_size=8, device="cpu")()
    assert batch["image"].shape == (8, 2, 8, 8)
    assert batch["auxiliary"]["image"].shape == (12, 2, 8, 8)
    assert batch["auxiliary"]["image"].dtype == torch.float32
    make_step({**config, "data": data}, "cpu")()


def test_flops_of_a_linear_layer_and_its_gradient_are_the_closed_form(toy_file):
    parts = experiment.build_parts(
        experiment.load_config(
            toy_file, {"network.hidden": "[]", "batch_size": "2048", "network.num_classes": "64"}
        )
    )
    # Forward and kernel gradient, of 3 seeds; what is elementwise, softmax above all, comes on top.
    product = 2 * 2048 * 4 * 64
    assert 2 * 3 * product < benchmark._flops_per_step(parts) < 2 * 3 * product + 3 * 20 * 2048 * 64


def test_what_a_worker_finds_wrong_is_the_users_error(toy_file):
    with pytest.raises(UserError, match=r"config\.devices: seed=99 × data=1 asks for more"):
        benchmark.main([toy_file, *QUICK, "--config.devices.seed=99"])


def test_a_worker_that_dies_is_told_from_bad_input():
    with pytest.raises(WorkerDied, match="status 3") as error:
        Worker(("-c", "raise SystemExit(3)"), {})
    assert error.value.status == 1


def test_memory_is_that_of_the_worker_and_not_of_the_process_that_started_it():
    echo = "import sys; [print(line, end='', flush=True) for line in sys.stdin]"
    with Worker(("-c", echo), {"task": 1}) as worker:
        assert worker.about == {"task": 1}
        memory = worker.peak_memory()
    if memory is None:
        pytest.skip("this system does not tell")
    assert 1e6 < memory < 1e8  # this process, with JAX, has far more


def test_without_torch_the_way_to_get_it_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    worker, reason = benchmark._start_torch({}, {"torch": False}, "cpu", None)
    assert worker == {}
    assert reason == "torch is not installed; pip install -e .[torch]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds 0: expected 1 or more"),
        (["--seconds", "nan"], "--seconds nan"),
        (["--stage", "enrgy"], "Did you mean 'energy'?"),
        (["--out", "absent/speed.json"], "no folder absent"),
        (["--round", "2"], "--round: not an option"),
        (["--scores", "--against", "both"], "--against both: scores are measured against torch only"),
    ],
)
def test_bad_arguments_name_the_mend(stages_file, arguments, message):
    with pytest.raises(UserError) as error:
        benchmark.main([stages_file, *arguments])
    assert message in str(error.value)


def test_a_stage_of_a_config_without_stages_is_the_users_error(toy_file):
    with pytest.raises(UserError, match="no such stage. It has none"):
        benchmark.main([toy_file, "--stage", "erm"])


# --- The counterparts ---


def variables_of(module):
    """The variables of our network that has the weights of a PyTorch module."""
    params, batch_stats = {}, {}
    for name, tensor in module.state_dict().items():
        *parents, last = name.split(".")
        if last == "num_batches_tracked":
            continue
        array = tensor.numpy().copy()
        tree = batch_stats if last.startswith("running") else params
        for parent in parents:
            tree = tree.setdefault(parent, {})
        key = last.removeprefix("running_")
        if last == "weight":
            key = "scale" if array.ndim == 1 else "kernel"
            array = array.transpose({1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[array.ndim])
        tree[key] = array
    return {"params": params, **({"batch_stats": batch_stats} if batch_stats else {})}


@pytest.mark.parametrize(
    ("stage", "network"),
    [
        ("erm", dict(name="mlp", hidden=[16, 8], norm="batch_norm")),
        ("energy", dict(name="mlp", activation="silu")),
        ("exposure", dict(name="conv_net", order="swap", activation="gelu")),
        ("energy", dict(name="wide_resnet", depth=10, widen_factor=2, dropout_rate=0.0)),
        pytest.param("erm", dict(name="resnet", depth=20), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_the_first_three_losses_agree_with_ours(stage, network, stages_file):
    torch = pytest.importorskip("torch")
    from third_party import torch_counterparts
    from third_party.torch_counterparts.networks import make_network

    config = configs.stage_configs(experiment.load_config(stages_file))[stage]
    config["network"] = {"num_classes": 10, **network}
    rng = np.random.default_rng(0)

    def draw(count):
        image = rng.normal(size=(count, 8, 8, 2)).astype(np.float32)
        return {"image": image, "label": rng.integers(0, 10, count)}

    def as_torch(batch):
        image, label = torch.from_numpy(batch["image"]).movedim(-1, 1), torch.from_numpy(batch["label"])
        return {"image": image, "label": label}

    batches = [(draw(8), draw(12)) for _ in range(3)]
    ours = [{**main, "auxiliary": auxiliary} for main, auxiliary in batches]
    theirs = [{**as_torch(main), "auxiliary": as_torch(auxiliary)} for main, auxiliary in batches]

    torch.manual_seed(0)
    module = make_network(config["network"], (2, 8, 8))
    method = experiment.build_parts(config, stage).make_method({"network": variables_of(module)})
    name = config["method"]["name"]
    file = importlib.import_module(f"third_party.torch_counterparts.{name.replace('.', '_')}")
    update = torch_counterparts.call({name: file.make_update}, config["method"], config, module, theirs[0])
    expected = [float(update(batch)) for batch in theirs]

    key, losses = jax.random.key(0), []
    state = jax.jit(method.init)(key, ours[0])
    compiled_update = jax.jit(method.update)
    for batch in ours:
        state, metrics = compiled_update(state, batch, key)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        (dict(name="vgg", num_classes=2), "no counterpart of vgg"),
        (dict(name="mlp", num_classes=2, dtype="bfloat16"), "no counterpart of relu in bfloat16"),
        (dict(name="mlp", num_classes=2, gating=1), "unexpected keyword argument 'gating'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_counterpart_is_named(section, reason):
    pytest.importorskip("torch")
    from third_party.torch_counterparts import NoCounterpart
    from third_party.torch_counterparts.networks import make_network

    with pytest.raises(NoCounterpart, match=reason):
        make_network(section, (1, 2, 2))


def test_the_counterparts_images_are_crops_and_mirror_images(tmp_path):
    pytest.importorskip("torch")
    from third_party.torch_counterparts.data import make_sample

    image = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3, 1)
    np.savez(tmp_path / "0.npz", image=image, label=np.array([4], np.int32))
    section = dict(
        name="streams.resident",
        dataset=str(tmp_path / "0.npz"),
        transforms=[dict(name="transforms.random_crop", padding=1), dict(name="transforms.random_flip")],
    )
    batch = make_sample(section, batch_size=400, device="cpu")()
    padded = np.pad(image[0, :, :, 0], 1)
    crops = [padded[i : i + 3, j : j + 3] for i in range(3) for j in range(3)]
    expected = {crop.tobytes() for crop in crops} | {np.fliplr(crop).tobytes() for crop in crops}
    assert {drawn.tobytes() for drawn in batch["image"].numpy()} == expected
    assert set(batch["label"].tolist()) == {4}
