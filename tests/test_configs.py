"""Every config, at every size, builds: names resolve and all shapes fit. Nothing is trained."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.debiasing.methods import METHODS
from configs.speed.standard import PROGRAMS
from jaxlab import config as configs
from jaxlab import experiment
from jaxlab.core import UserError
from jaxlab.data import corruptions, raw, store
from jaxlab.train.program import check_fit

CONFIGS = sorted(
    path for path in Path(__file__).parents[1].glob("configs/*/*.py") if "def get_config(" in path.read_text()
)
CONFIG_FOLDER = Path(__file__).parents[1] / "configs"
DEBIASING = CONFIG_FOLDER / "debiasing"
ACTIVATION_ASYMMETRY = CONFIG_FOLDER / "activation_asymmetry"
DOMAIN_GENERALIZATION = CONFIG_FOLDER / "domain_generalization"
OOD_DETECTION = [CONFIG_FOLDER / "ood_detection" / name for name in ("fashion_mnist.py", "cifar.py")]
TRANSFER = [CONFIG_FOLDER / "transfer" / name for name in ("fashion_mnist.py", "image_benchmarks.py")]
SPEED = CONFIG_FOLDER / "speed"
ONE_DEVICE = {"seeds": "1", "devices.data": "1"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Data sets under the names of those that must be fetched, black and just as long as the configs' slices."""
    folder = tmp_path_factory.mktemp("data")
    for name, shape, sizes in (
        ("mnist", (28, 28, 1), {"train": 8000, "test": 2000}),
        ("fashion_mnist", (28, 28, 1), {"train": 8000, "test": 2000}),
        ("cifar10", (32, 32, 3), {"train": 2000, "test": 1000}),
    ):
        arrays = {
            split: (np.broadcast_to(np.uint8(0), (size, *shape)), {"label": np.arange(size) % 10})
            for split, size in sizes.items()
        }
        made = raw.from_arrays(arrays, {"label": [str(i) for i in range(10)]})
        store.generate(store.raw_builder(name, made, str(folder)))
    return folder


@pytest.fixture(autouse=True)
def offline(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    fast = dict.fromkeys(corruptions.CORRUPTIONS, corruptions.original)
    monkeypatch.setattr(corruptions, "CORRUPTIONS", fast)


@pytest.mark.parametrize("size", ["cpu", "paper"])
@pytest.mark.parametrize(
    "path",
    [
        p
        for p in CONFIGS
        if p.parent not in (ACTIVATION_ASYMMETRY, DEBIASING, DOMAIN_GENERALIZATION, SPEED)
        and p not in (*OOD_DETECTION, *TRANSFER)
    ],
    ids=lambda p: f"{p.parent.name}/{p.stem}",
)
def test_a_config_builds(path, size):
    config = experiment.load_config(f"{path}:{size}", ONE_DEVICE)
    for stage, stage_config in (configs.stage_configs(config) or {"": config}).items():
        parts = experiment.build_parts(stage_config, stage)
        shapes = experiment.build_program(parts, experiment.build_mesh(parts.settings)).abstract()
        assert shapes.state.variables["params"]
        assert set(shapes.metric_sums) >= {"loss"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_of_the_benchmark_fits(program):
    config = experiment.load_config(f"{SPEED}/standard.py:{program},2", {"devices.data": "1"})
    assert config["seeds"] == 2
    parts = experiment.build_parts(config)
    check_fit(parts.make_method, parts.stream)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_debiasing_builds_and_has_what_its_evaluators_need(method):
    config = experiment.load_config(f"{DEBIASING}/colored_digits.py:cpu,{method}", ONE_DEVICE)
    assert list(config["stages"])[-1] == method
    experiment.check_stages(config)

    def zeros(tree):
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)

    for stage, stage_config in configs.stage_configs(config).items():
        parts = experiment.build_parts(stage_config, stage)
        predict = functools.partial(jax.eval_shape, parts.make_method(None).predict)
        state, metrics = check_fit(parts.make_method, parts.stream)
        assert set(metrics) >= {"loss", "accuracy"}
        assert parts.evaluators

        for evaluator in parts.evaluators.values():
            assert evaluator.evaluate(lambda *a, predict=predict: zeros(predict(*a)), zeros(state))


# A method for each kind of network, state and column of the data set.
@pytest.mark.parametrize(
    "file_and_arguments",
    [
        "colored_digits.py:paper",
        "colored_mnist.py",
        "colored_mnist.py:cpu,jtt",
        "colored_mnist.py:cpu,bias_only,0.5,fashion_mnist",
        "colored_mnist.py:paper,disentangled_bias_ensemble",
        "corrupted_cifar10.py",
        "corrupted_cifar10.py:paper",
        "corrupted_cifar10.py:cpu,bias_only,2,type1",
        "corrupted_cifar10.py:paper,disentangled,5,disentangled",
    ],
)
def test_a_config_of_debiasing_builds(file_and_arguments):
    experiment.check_stages(experiment.load_config(f"{DEBIASING}/{file_and_arguments}", ONE_DEVICE))


@pytest.fixture
def any_data(monkeypatch):
    """A few black images in place of every data set and split, the large ones too."""
    shapes = {"pacs": (256, 256, 3), "office_home": (64, 64, 3), "nico_animal": (64, 64, 3)}
    shapes |= {"nico_vehicle": (64, 64, 3), "mnist": (28, 28, 1), "fashion_mnist": (28, 28, 1)}

    def arrays(dataset, split, data_dir=None):
        rows = np.arange(120, dtype=np.int32)
        image = np.zeros((120, *shapes.get(dataset, (32, 32, 3))), np.uint8)
        return {"image": image, "label": rows % 7, "context": rows % 12}

    monkeypatch.setattr(store, "arrays", arrays)
    monkeypatch.setattr(store, "num_classes", lambda dataset, data_dir=None, feature="label": 12)


# A method for each kind of state, head and build.
@pytest.mark.parametrize(
    "file_and_arguments",
    [
        *(
            f"domain_generalization/colored_mnist.py:cpu,{method}"
            for method in ("oracle", "irm", "mm_rex", "decaug_environments")
        ),
        "domain_generalization/colored_mnist.py:paper,vrex",
        pytest.param(
            "domain_generalization/colored_mnist.py:paper,cdann,domainbed,3", marks=pytest.mark.slow
        ),
        *(
            f"domain_generalization/contexts.py:cpu,{method}"
            for method in ("erm", "dann", "coral", "erm_on_decaug_head")
        ),
        pytest.param("domain_generalization/contexts.py:paper,mmd,rotations,1", marks=pytest.mark.slow),
        "domain_generalization/contexts.py:cpu,mixup,contexts,0,pairs",
        "domain_generalization/pacs.py",
        pytest.param("domain_generalization/pacs.py:paper,irm", marks=pytest.mark.slow),
        pytest.param("domain_generalization/pacs.py:paper,decaug", marks=pytest.mark.slow),
        "domain_generalization/pacs.py:cpu,group_dro,office_home",
        "domain_generalization/nico.py",
        pytest.param("domain_generalization/nico.py:paper,decaug_paper,vehicle", marks=pytest.mark.slow),
        pytest.param("domain_generalization/nico.py:cpu,group_dro", marks=pytest.mark.slow),
        "domain_generalization/nico.py:cpu,cdann",
        "activation_asymmetry/fashion_mnist.py",
        pytest.param("activation_asymmetry/fashion_mnist.py:paper,all,norm_spared", marks=pytest.mark.slow),
        "ood_detection/fashion_mnist.py",
        pytest.param("ood_detection/fashion_mnist.py:paper", marks=pytest.mark.slow),
        "ood_detection/cifar.py",
        pytest.param("ood_detection/cifar.py:paper,cifar100", marks=pytest.mark.slow),
        "transfer/fashion_mnist.py",
        pytest.param("transfer/fashion_mnist.py:paper", marks=pytest.mark.slow),
        "transfer/image_benchmarks.py",
        "transfer/image_benchmarks.py:cpu,cifar10",
        pytest.param("transfer/image_benchmarks.py:paper,domainnet", marks=pytest.mark.slow),
    ],
)
def test_a_config_whose_data_are_not_here_builds(file_and_arguments, any_data):
    config = experiment.load_config(f"{CONFIG_FOLDER}/{file_and_arguments}", ONE_DEVICE)
    stages = list(configs.stage_configs(config).items()) or [("", config)]
    for stage, stage_config in [stages[0], stages[-1]]:  # those between them differ little
        parts = experiment.build_parts(stage_config, stage)
        _, metrics = check_fit(parts.make_method, parts.stream)
        assert set(metrics) >= {"loss", "accuracy"}
        assert parts.evaluators


@pytest.mark.parametrize("problem", ["irm", "domainbed", "contexts", "rotations"])
def test_the_comparison_has_every_method_as_its_own_config_trains_it(problem):
    config = experiment.load_config(f"{DOMAIN_GENERALIZATION}/compare.py:cpu,{problem}")
    compared = configs.stage_configs(config)
    if problem in ("irm", "domainbed"):
        one = {"irm": experiment.load_config(f"{DOMAIN_GENERALIZATION}/colored_mnist.py:cpu,irm,{problem}")}
    else:
        own = experiment.load_config(f"{DOMAIN_GENERALIZATION}/contexts.py:cpu,irm,{problem}")
        one = {f"irm_{domain}": stage for domain, stage in configs.stage_configs(own).items()}
    assert {name: compared[name] for name in one} == one


@pytest.mark.parametrize(
    ("own", "compared"),
    [
        ("colored_digits.py:cpu,{},2", "cpu,2,digits"),
        ("colored_mnist.py:paper,{},0.5,fashion_mnist", "paper,0.5,fashion_mnist"),
    ],
)
def test_the_comparison_trains_what_the_config_of_each_method_trains(own, compared):
    stages = {}
    for method in METHODS:
        one = experiment.load_config(f"{DEBIASING}/{own.format(method)}")
        for name, stage in configs.stage_configs(one).items():
            assert stages.setdefault(name, stage) == stage  # two methods may share one
    compared = configs.stage_configs(experiment.load_config(f"{DEBIASING}/compare.py:{compared}"))
    assert list(compared) == list(stages)
    assert compared == stages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("small", "no size 'small'; it may be cpu, paper"),
        ("cpu,lf", "no method 'lf'; it may be erm, "),
        ("cpu,lff,1,kmnist", "no data set 'kmnist'; it may be mnist, fashion_mnist"),
    ],
)
def test_an_unknown_argument_is_named_with_what_it_may_be(arguments, message):
    with pytest.raises(UserError, match=message):
        experiment.load_config(f"{DEBIASING}/colored_mnist.py:{arguments}")
