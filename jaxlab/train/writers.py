"""Metrics on disk: a JSON line for every logged step, the same for TensorBoard, a line for the reader."""

import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from jaxlab.train.evaluation import to_json

logger = logging.getLogger(__name__)


class MetricWriter:
    """Writes `metrics.jsonl` and TensorBoard events of one run; silent on all hosts but the first.

    Opening it at step s drops the lines after s that a killed run had written, so that a resumed file
    has every step once.
    """

    def __init__(self, workdir: Path, step: int, *, primary: bool = True):
        self._file: TextIO | None = None
        self._events: EventWriter | None = None
        if not primary:
            return
        path = workdir / "metrics.jsonl"
        _drop_lines_after(path, step)
        self._file = path.open("a", encoding="utf-8")
        try:
            self._events = EventWriter(workdir, step)
        except OSError as error:
            logger.warning("no TensorBoard file: %s", error)

    def write(self, step: int, split: str, metrics: Mapping[str, Any], **events_only: float) -> None:
        """Adds a line; `metrics` have one entry a seed. Timings go to TensorBoard only: lines are bitwise
        the same in every run of a config."""
        if self._file is None:
            return
        line = {"step": step, "split": split, **to_json(dict(metrics))}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is None:
            return
        try:
            self._events.write(step, split, {**metrics, **events_only})
        except OSError as error:
            logger.warning("TensorBoard file is given up: %s", error)
            self._events = None

    def sync(self) -> None:
        """Puts the lines on the disk, before a checkpoint that relies on them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


class EventWriter:
    """A TensorBoard file of scalars, each the mean over seeds."""

    def __init__(self, workdir: Path, step: int):
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._file = (workdir / name).open("wb")
        self._records = RecordWriter(self._file)
        self._add(Event(file_version="brain.Event:2"))
        # Tells TensorBoard to forget what a killed run had written after this step.
        self._add(Event(session_log=SessionLog(status=SessionLog.START), step=step + 1))

    def write(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        values = [
            Summary.Value(tag=f"{split}/{name}", simple_value=float(np.mean(value)))
            for name, value in metrics.items()
        ]
        self._add(Event(summary=Summary(value=values), step=step))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > step or not line.endswith(b"\n"):
                break
        except (ValueError, KeyError, TypeError):  # the half line of a killed run, and what follows it
            break
        kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(path)


class ProgressLine:
    """How far a run is: a bar on a terminal, a plain line at each log elsewhere."""

    def __init__(self, title: str, step: int, steps: int, *, primary: bool = True):
        self._title, self._steps = title, steps
        # Nothing is read as markup: the title of a run of a sweep has brackets, "network.hidden=[64]".
        self._console = Console(quiet=not primary, soft_wrap=True, markup=False, emoji=False, highlight=False)
        self._last_log = (step, time.monotonic())
        self._bar = None
        if self._console.is_terminal and primary:
            columns = (
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", markup=False),
            )
            self._bar = Progress(*columns, console=self._console, refresh_per_second=4)
            self._task = self._bar.add_task(title, total=steps, completed=step, text="compiling")
            self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> float:
        """Shows the means of some metrics; returns the steps per second since the last call."""
        now = time.monotonic()
        rate = (step - self._last_log[0]) / max(now - self._last_log[1], 1e-9)
        self._last_log = (step, now)
        text = "  ".join(f"{name} {np.mean(values):.4g}" for name, values in metrics.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=f"{text}  {rate:,.0f} steps/s")
        else:
            self._console.print(f"{self._title}  step {step}/{self._steps}  {text}  {rate:,.0f} steps/s")
        return rate

    def resume(self) -> None:
        """Time spent on evaluations and checkpoints is not counted as time of steps."""
        self._last_log = (self._last_log[0], time.monotonic())

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
