"""Metrics outlive a TensorBoard file that cannot be written and a clock that is set back."""

import itertools
import json
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from jaxlab.train.writers import MetricWriter
from tests.launch import runs

METRICS = {"loss": np.array([1.0, 2.0])}


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in runs.lines(folder).splitlines()]


def test_where_no_tensorboard_file_can_be_made_metrics_are_written_all_the_same(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(socket, "gethostname", lambda: "no/such/folder")
    writer = MetricWriter(tmp_path, 0)
    writer.write(1, "train", METRICS)
    writer.close()
    assert steps(tmp_path) == [1]
    assert "no TensorBoard file" in caplog.text


def test_a_tensorboard_file_on_a_full_disk_is_given_up_once(tmp_path, caplog):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    writer = MetricWriter(tmp_path, 0)
    with open("/dev/full", "wb", buffering=0) as full:
        writer._events._file, writer._events._records = full, RecordWriter(full)
        for step in (1, 2):
            writer.write(step, "train", METRICS)
    writer.close()
    assert steps(tmp_path) == [1, 2]
    assert caplog.text.count("TensorBoard file is given up") == 1


def test_a_clock_that_is_set_back_changes_no_result(tmp_path, monkeypatch):
    config = runs.write_config(tmp_path)
    assert runs.run(config, tmp_path / "undisturbed") == 0
    now = time.time()
    with monkeypatch.context() as patch:
        backwards = itertools.count(now, -60)
        patch.setattr(time, "time", lambda: next(backwards))
        with monkeypatch.context() as stopping:
            runs.stop_at(stopping, 20)
            assert runs.run(config, tmp_path / "back") > 128
        assert runs.run(config, tmp_path / "back") == 0
    assert runs.lines(tmp_path / "back") == runs.lines(tmp_path / "undisturbed")
    assert runs.result(tmp_path / "back") == runs.result(tmp_path / "undisturbed")
