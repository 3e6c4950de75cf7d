"""What is published stands beside a run's own figures where the protocol is the same, and nowhere else."""

import pytest

from jaxlab.report.page import write_report
from jaxlab.report.published import beside_published
from jaxlab.report.runs import read_runs

SETS = ("textures", "svhn_test", "places365", "lsun_crop", "lsun_resize", "isun")
PROTOCOL = dict(name="ood_detection.detection", positive="id", rule="nearest", n_ood=2000, draws=10)
PROTOCOL["ood"] = {name: dict(name="store.arrays", dataset=name, split="all") for name in SETS}
NETWORK = dict(name="wide_resnet", num_classes=10, depth=40, widen_factor=2, dropout_rate=0.3)
TEST = dict(name="store.arrays", dataset="cifar10", split="test")


def write(write_run, name="run", network=NETWORK, dataset=TEST, **protocol):
    evaluator = {**PROTOCOL, "dataset": dataset, **protocol}
    stages = dict(pretrain=dict(network=network, evaluators=dict(d=evaluator)))
    metrics = dict(fpr95=[0.5, 0.52], auroc=[0.9, 0.9], aupr=[0.97, 0.98])
    figures = {f"d/energy/mean/{metric}": values for metric, values in metrics.items()}
    write_run(name, {f"pretrain/{key}": values for key, values in figures.items()}, stages=stages)
    return write_run(f"{name}/pretrain", figures, **stages["pretrain"]).parent


def test_the_published_row_of_the_same_experiment_is_found(write_run, tmp_path):
    workdir = write(write_run)
    (row,) = beside_published(read_runs([workdir])[0].parts())
    assert (row.run, row.stage, row.score, row.ood) == ("run", "pretrain", "energy", "mean")
    assert row.figures[0] == ("51.00 ± 1.00", "33.01")
    assert "Table 2" in row.source
    page = write_report([workdir], tmp_path / "report").read_text()
    assert "Beside published figures" in page
    assert "33.01" in page


@pytest.mark.parametrize(
    "change",
    [
        dict(network={**NETWORK, "depth": 28}),
        dict(dataset={**TEST, "split": "train"}),
        dict(dataset={**TEST, "dataset": "cifar100", "split": "test[:100]"}),
        dict(n_ood=200),
        dict(positive="ood"),
        dict(ood={name: {} for name in SETS[:2]}),
    ],
)
def test_another_protocol_is_not_compared(write_run, tmp_path, change):
    workdir = write(write_run, **change)
    assert beside_published(read_runs([workdir])[0].parts()) == []
    assert "Beside published" not in write_report([workdir], tmp_path / "report").read_text()
