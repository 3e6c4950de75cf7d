"""Programs that are measured in processes of their own, which take turns."""

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlab.core import UserError

_TORCH_DEVICES = {"cpu": "cpu", "gpu": "cuda"}  # by JAX's backend


class WorkerDied(UserError):
    """A measured process ended by itself; its traceback, if any, is on stderr."""

    status = 1


class Worker:
    """A program in a process of its own, which runs only while it is asked to.

    It reads one JSON object a line and answers each; the first is its task. What it answers to that is
    `about`.

    Raises:
      UserError: the process says that its task is at fault.
      WorkerDied: it is gone.
    """

    def __init__(self, command: Sequence[str], task: Mapping[str, Any]):
        paths = [path or os.getcwd() for path in sys.path]
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent, which ends it
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "JAX_ENABLE_COMPILATION_CACHE": "false",  # compiling is measured
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the device is shared, its memory measured
            },
        )
        try:
            self.about = self.ask(**task)
        except BaseException:
            self.__exit__()
            raise

    def ask(self, **message: Any) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(message), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise WorkerDied(f"the measured process ended with status {self._process.wait()}; see above.")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def peak_memory(self) -> int | None:
        """The most bytes the process has had in memory."""
        # Not ru_maxrss: on Linux a process takes that over from the one that started it.
        status = Path(f"/proc/{self._process.pid}/status")
        if not status.exists():
            return None
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()


def read_task() -> tuple[dict[str, Any], Callable[..., None]]:
    """The task of this process, a `Worker`, and `reply(**content)`, which answers it and what follows."""
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints must not mix with the replies

    def reply(**content: Any) -> None:
        print(json.dumps(content), file=replies, flush=True)

    return json.loads(sys.stdin.readline()), reply


def torch_device(backend: str) -> tuple[str | None, str | None]:
    """What PyTorch calls the device of a JAX backend; or None, and why it cannot be compared with."""
    if importlib.util.find_spec("torch") is None:
        return None, "torch is not installed; pip install -e .[torch]"
    if backend not in _TORCH_DEVICES:
        return None, f"plain PyTorch has no {backend}"
    return _TORCH_DEVICES[backend], None


def spread(values: Sequence[float]) -> dict[str, Any]:
    values = [float(value) for value in values]
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def spell(spread: Mapping[str, Any]) -> str:
    def spell(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    return f"{spell(spread['median'])} [{spell(spread['min'])}–{spell(spread['max'])}]"
