"""The process that `launch.benchmark` starts for PyTorch: it reads and writes lines of JSON.

The first line in is the task, {"config", "device", "compile"}; a reply says what was built, or what has no
counterpart. Each further line, {"seconds"}, is answered with the steps made in at least that time: {"steps",
"seconds", "device_bytes"}. A step is one of every seed, one seed after the other, each with a network of its
own.
"""

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from third_party.torch_counterparts import NoCounterpart, call
from third_party.torch_counterparts.data import make_sample
from third_party.torch_counterparts.networks import make_network


def main() -> None:
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints must not mix with the replies

    def reply(**content: Any) -> None:
        print(json.dumps(content), file=replies, flush=True)

    task = json.loads(sys.stdin.readline())
    device = task["device"]
    try:
        config = task["config"]
        network = {**config["network"], "compile": task["compile"]}
        step = make_step({**config, "network": network}, device)
    except NoCounterpart as error:
        reply(missing=str(error))
        return
    start = time.perf_counter()
    try:
        step()
    except Exception as error:  # of many kinds: TorchInductor wants a C++ compiler that suits it
        if not task["compile"]:
            raise
        reply(missing=f"torch.compile fails: {str(error).partition(chr(10))[0]}")
        return
    first_step = time.perf_counter() - start
    if device == "cpu":
        _choose_threads(step)
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device}
    reply(environment=environment, compile_seconds=first_step if task["compile"] else None)
    for line in sys.stdin:
        limit = json.loads(line)["seconds"]
        steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < limit:
            step()
            steps += 1
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        reply(steps=steps, seconds=seconds, device_bytes=peak)


def make_step(config: Mapping[str, Any], device: str) -> Callable[[], None]:
    """Returns `step()`, one step of every seed of an experiment whose data sets are files (see `data`)."""
    if device == "cuda" and not torch.cuda.is_available():
        raise NoCounterpart("PyTorch sees no GPU here")
    name = config["method"]["name"]
    module = f"{__package__}.{name.replace('.', '_')}"
    found = importlib.util.find_spec(module) is not None
    methods = {name: importlib.import_module(module).make_update} if found else {}
    sample = make_sample(config["data"], batch_size=config["batch_size"], device=device)
    updates = []
    for seed in range(config["seed"], config["seed"] + config["seeds"]):
        torch.manual_seed(seed)
        batch = sample()
        inputs = batch["image" if "image" in batch else "xs"]
        leading = batch["label"].ndim if "label" in batch else 1  # of environments [E, n, ...] two
        network = make_network(config["network"], inputs.shape[leading:]).to(device)
        updates.append(call(methods, config["method"], config, network, batch))

    def step() -> None:
        for update in updates:
            update(sample())

    return step


def _choose_threads(step: Callable[[], None]) -> None:
    """Keeps the faster of PyTorch's default and one thread, for small networks and busy machines."""

    def fastest(threads: int) -> float:
        torch.set_num_threads(threads)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return min(times)

    torch.set_num_threads(min((torch.get_num_threads(), 1), key=fastest))


if __name__ == "__main__":
    main()
