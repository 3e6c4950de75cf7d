"""Measures how fast configs train, and how fast the same step is in plain PyTorch.

  python -m launch.benchmark configs/ood_detection/digits.py
  python -m launch.benchmark configs/ood_detection/digits.py:paper --stage energy --against torch
  python -m launch.benchmark configs/speed/standard.py:lff configs/speed/standard.py:lff,8 --against both
  python -m launch.benchmark configs/ood_detection/fashion_mnist.py --scores --against torch

Each program has a process of its own, and they take turns, round after round, so that a machine that is
slowed by something else slows them all; figures are medians over the rounds, with the lowest and highest.
A step is one of all seeds. Stages start from fresh variables. PyTorch trains the seeds one after the other
on the data set that the stream draws from, with one thread or its default number, whichever is faster.
With --scores, the post-hoc scores of the first stage's evaluator are measured in place of its training.
"""

import argparse
import collections
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from jaxlab import config as configs
from jaxlab import experiment
from jaxlab.core import UserError, build
from jaxlab.core.errors import nearest
from jaxlab.train import devices
from jaxlab.train.evaluation import environment
from jaxlab.train.loop import CALLS_AHEAD
from launch import cli, score_benchmark
from launch.worker import Worker, read_task, spell, spread, torch_device

OURS = ("-c", "from launch.benchmark import serve; serve()")
TORCH = ("-m", "third_party.torch_counterparts")
# What --against may be: the programs of PyTorch, and whether `torch.compile` compiles their networks.
COUNTERPARTS = {"torch": {"torch": False}, "torch.compile": {"torch_compile": True}}
COUNTERPARTS["both"] = COUNTERPARTS["torch"] | COUNTERPARTS["torch.compile"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.benchmark",
        description=__doc__,
        epilog="Any key of the configs can be set: --config.seeds=1, --config.network.depth=16.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("configs", metavar="CONFIG[:SIZE]", nargs="+", help="config file; sizes: cpu, paper")
    parser.add_argument(
        "--against", choices=list(COUNTERPARTS), help="measure the plain PyTorch counterpart too"
    )
    parser.add_argument("--stage", metavar="NAME", help="only this stage; default: each of a config's stages")
    parser.add_argument(
        "--scores", action="store_true", help="out-of-distribution scores instead of training steps"
    )
    parser.add_argument("--rounds", metavar="N", type=int, default=5, help="rounds each (default: 5)")
    parser.add_argument(
        "--seconds", metavar="S", type=float, default=2.0, help="least length of a round (default: 2)"
    )
    parser.add_argument("--out", metavar="FILE.json", type=Path, help="write every figure there")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.scores and arguments.against not in (None, "torch"):
        raise UserError(f"--against {arguments.against}: scores are measured against torch only.")
    if arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds}: expected 1 or more.")
    if not 0 < arguments.seconds < float("inf"):
        raise UserError(f"--seconds {arguments.seconds}: expected a time above 0.")
    if arguments.out and not arguments.out.parent.is_dir():
        raise UserError(f"--out {arguments.out}: no folder {arguments.out.parent}; make it first.")
    overrides = cli.overrides(rest)
    stages = [
        (name, stage, config)
        for name in arguments.configs
        for stage, config in _stages(name, arguments.stage, overrides, only_first=arguments.scores)
    ]
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    benchmarks = []
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for name, stage, config in stages:
            task = progress.add_task(f"{_label(name, stage)}: compiling", total=arguments.rounds)

            def show(done: int, program: str, task: Any = task, label: str = _label(name, stage)) -> None:
                progress.update(task, completed=done, description=f"{label}: {program}")

            common = {"against": arguments.against, "rounds": arguments.rounds, "show": show}
            if arguments.scores:
                figures = score_benchmark.measure(config, stage, **common)
            else:
                figures = measure(config, stage, seconds=arguments.seconds, **common)
            benchmarks.append({"config": name, "stage": stage, **figures})
            progress.remove_task(task)
            if arguments.out:  # after each, for the whole set takes long
                content = {"overrides": overrides, "seconds": arguments.seconds, "benchmarks": benchmarks}
                text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
                arguments.out.write_text(text, encoding="utf-8")
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # in a file, lines may be as long as they are
    show_figures = score_benchmark.print_tables if arguments.scores else _print
    labelled = [(_label(benchmark["config"], benchmark["stage"]), benchmark) for benchmark in benchmarks]
    show_figures(console, labelled)
    return 0


def measure(
    config: Mapping[str, Any],
    stage: str = "",
    *,
    against: str | None = None,
    rounds: int,
    seconds: float,
    show: Callable[[int, str], None],
) -> dict[str, Any]:
    """Measures one experiment without stages, or one stage.

    Args:
      config: of the experiment or stage, checked.
      stage: its name, for messages.
      against: a key of COUNTERPARTS, or None for our program alone.
      rounds: how often each program runs.
      seconds: the least length of a round.
      show: `show(rounds_done, what_runs)`.

    Returns:
      What may be written as JSON; `steps_per_second` and the like are {"median", "min", "max", "values"}
      over the rounds. FLOPs are XLA's count for the step as it is traced, an estimate: a loop's body
      counts once. `flop_share` is that over what a large matrix product reached in the same round, a
      counterpart's `ratio` our steps/s over its own; None stands for a counterpart that was not measured.
      `memory_bytes` is the peak of the process (None where the system does not tell), `device_bytes` that
      of the fullest accelerator (None for CPUs), both after the first round.
    """
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Worker(OURS, {"config": config, "stage": stage}))
        programs, missing = {"ours": ours}, None
        if against is not None:
            backend = ours.about["environment"]["backend"]
            counterparts, missing = _start_torch(config, COUNTERPARTS[against], backend, stack)
            programs |= counterparts
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
        memory, products = {}, []
        for i in range(rounds):
            for name, worker in programs.items():
                show(i, name)
                answers[name].append(worker.ask(seconds=seconds))
                memory.setdefault(name, worker.peak_memory())  # before the matrix product adds its own
            products.append(ours.ask(product=True)["flops_per_second"])
    flops, seeds = ours.about["flops_per_step"], config["seeds"]
    rates = {name: np.array([a["steps"] / a["seconds"] for a in given]) for name, given in answers.items()}
    figures: dict[str, Any] = {
        "seeds": seeds,
        "batch_size": config["batch_size"],
        "rounds": rounds,
        "flops_per_step": flops,
        "product_flops_per_second": spread(products),
        "missing": missing,
        **dict.fromkeys(COUNTERPARTS["both"]),
    }
    for name, worker in programs.items():
        figures[name] = {
            **worker.about,
            "steps_per_second": spread(rates[name]),
            "examples_per_second": spread(rates[name] * seeds * config["batch_size"]),
            "seconds_per_step_and_seed": spread(1 / (rates[name] * seeds)),
            "flop_share": spread(flops * rates[name] / products) if flops else None,
            "memory_bytes": memory[name],
            "device_bytes": answers[name][0]["device_bytes"],
        }
        if name != "ours":
            figures[name]["ratio"] = spread(rates["ours"] / rates[name])
    return figures


def serve() -> None:
    """The process of our program: builds the task's config, then runs steps or the matrix product."""
    task, reply = read_task()
    devices.spread_over_cores(task["config"]["seeds"])
    try:
        parts = experiment.build_parts(task["config"], task["stage"])
        mesh = experiment.build_mesh(parts.settings)
        run, times = _compile(parts, mesh)
    except UserError as error:
        reply(error=str(error))
        return
    reply(environment=environment(), flops_per_step=_flops_per_step(parts), **times)
    product = None
    for line in sys.stdin:
        message = json.loads(line)
        if "product" in message:
            product = product or _matrix_product(mesh)
            reply(flops_per_second=product())
        else:
            start = time.perf_counter()
            steps = run(message["seconds"])
            reply(steps=steps, seconds=time.perf_counter() - start, device_bytes=_device_memory(mesh))


def _compile(parts: experiment.Parts, mesh: Mesh) -> tuple[Callable[[float], int], dict[str, float]]:
    """Returns `run(seconds) -> steps`, and the seconds until it was compiled.

    `start_seconds` is all that comes before the second call: tracing, the initial state, the first call.
    `compile_seconds` is how much longer the first call takes than the second.
    """
    start = time.perf_counter()
    program = experiment.build_program(parts, mesh)
    replicas, step = program.init(), 0
    # As in training, a call ends where a line of the log does.
    steps_per_call = min(program.steps_per_call, parts.settings.log_every)

    def run(seconds: float) -> int:
        nonlocal replicas, step
        begin, first = time.perf_counter(), step
        in_flight: collections.deque[jax.Array] = collections.deque()
        with contextlib.closing(program.host_batches(step, np.iinfo(np.int32).max)) as batches:
            while step == first or time.perf_counter() - begin < seconds:
                replicas, done = program.call(replicas, step, steps_per_call, next(batches))
                step += steps_per_call
                in_flight.append(done)
                if len(in_flight) > CALLS_AHEAD:
                    in_flight.popleft().block_until_ready()
        in_flight[-1].block_until_ready()
        return step - first

    jax.block_until_ready(replicas)
    times = [time.perf_counter()]
    for _ in range(2):
        run(0.0)
        times.append(time.perf_counter())
    first_call, second_call = np.diff(times)
    return run, {"start_seconds": times[1] - start, "compile_seconds": max(0.0, first_call - second_call)}


def _flops_per_step(parts: experiment.Parts) -> float | None:
    """FLOPs of one update of all seeds, as XLA counts them before it optimises; None if it does not."""
    method, key = parts.make_method(None), jax.random.key(0)
    stream = parts.stream
    batch = jax.eval_shape(stream.batch, 0, key) if stream.on_device else stream.batch(0, key)
    state = jax.eval_shape(method.init, key, batch)
    cost = jax.jit(method.update).lower(state, batch, key).cost_analysis() or {}
    flops = cost.get("flops", 0.0)
    return parts.settings.seeds * flops if flops > 0 else None


def _matrix_product(mesh: Mesh) -> Callable[[], float]:
    """Returns a function that measures the FLOP/s of a large float32 matrix product on all devices.

    It is the fastest of three, at JAX's default precision, which is that of the networks too.
    """
    size = 2048 if jax.default_backend() == "cpu" else 8192
    rows = NamedSharding(mesh, PartitionSpec((devices.SEED, devices.DATA)))
    left = devices.put(jnp.ones((size * mesh.size, size)), rows)
    right = devices.put(jnp.ones((size, size)), devices.replicated(mesh))
    multiply = jax.jit(jnp.matmul, out_shardings=rows)
    multiply(left, right).block_until_ready()

    def flops_per_second() -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            multiply(left, right).block_until_ready()
            times.append(time.perf_counter() - start)
        return 2 * left.size * size / min(times)

    return flops_per_second


def _device_memory(mesh: Mesh) -> int | None:
    """The most bytes that any device has held; None for devices that do not tell."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    return max(s["peak_bytes_in_use"] for s in stats) if all(stats) else None


def _start_torch(
    config: Mapping[str, Any], counterparts: Mapping[str, bool], backend: str, stack: contextlib.ExitStack
) -> tuple[dict[str, Worker], str | None]:
    """Starts the counterparts; says why one is missing."""
    device, missing = torch_device(backend)
    if device is None:
        return {}, missing
    workers = {}
    with tempfile.TemporaryDirectory() as folder:
        data = _save_datasets(config["data"], config["data_dir"] or None, Path(folder))
        for name, compiled in counterparts.items():
            task = {"config": {**config, "data": data}, "device": device, "compile": compiled}
            workers[name] = stack.enter_context(Worker(TORCH, task))
    missing = [worker.about["missing"] for worker in workers.values() if "missing" in worker.about]
    there = {name: worker for name, worker in workers.items() if "missing" not in worker.about}
    return there, (missing[0] if missing else None)


def _save_datasets(section: Mapping[str, Any], data_dir: str | None, folder: Path) -> dict[str, Any]:
    """Writes the data sets of a data section to files; returns the section with their paths in place."""
    saved = {}
    for key, value in section.items():
        if key == "dataset" and isinstance(value, Mapping):
            path = folder / f"{len(list(folder.iterdir()))}.npz"
            np.savez(path, **build("data", value, data_dir=data_dir))
            value = str(path)
        elif isinstance(value, Mapping):
            value = _save_datasets(value, data_dir, folder)
        elif isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
            value = [_save_datasets(part, data_dir, folder) for part in value]
        saved[key] = value
    return saved


def _stages(
    name: str, wanted: str | None, overrides: Mapping[str, str], *, only_first: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    config = experiment.load_config(name, overrides)
    stages = configs.stage_configs(config)
    if wanted is None:
        every = list((stages or {"": config}).items())
        yield from every[:1] if only_first else every
    elif wanted in stages:
        yield wanted, stages[wanted]
    else:
        there = f"It has: {', '.join(stages)}." if stages else "It has none."
        raise UserError(f"--stage {wanted}: {name} has no such stage.{nearest(wanted, stages)} {there}")


def _label(name: str, stage: str) -> str:
    path, colon, size = name.partition(":")
    return " · ".join(filter(None, [f"{Path(path).stem}{colon}{size}", stage]))


def _print(console: Console, benchmarks: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    # Where the terminal is narrow, cells are broken at their spaces, so that no figure is cut.
    between = " " if console.width >= 100 else "\n"
    heads = "", "compile s", "steps/s", "examples/s", "ms/step /seed", "peak MB", "FLOP/s share", "ratio"
    for label, benchmark in benchmarks:
        table = Table(
            title=Text(label, "bold"), title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for head in heads:
            table.add_column(head.replace(" ", "\n"), justify="right" if head else "left")
        for program in ("ours", *COUNTERPARTS["both"]):
            if benchmark[program]:
                table.add_row(*(Text(cell.replace(" ", between)) for cell in _row(benchmark, program)))
        console.print(table)
        if benchmark["missing"]:
            console.print(Text(f"not measured against torch: {benchmark['missing']}\n"), soft_wrap=True)
    _, first = benchmarks[0]
    versions = [f"jax {first['ours']['environment']['jax']}"]
    torch = [b[name] for _, b in benchmarks for name in COUNTERPARTS["both"] if b[name]]
    versions += [f"torch {program['environment']['torch']}" for program in torch[:1]]
    console.print(
        f"{', '.join(versions)} on {first['ours']['environment']['device']}; a large float32 matrix product"
        f" reaches {first['product_flops_per_second']['median'] / 1e9:,.0f} GFLOP/s. Medians of"
        f" {first['rounds']} rounds [lowest–highest]; ratio is our steps/s over theirs; FLOPs are XLA's"
        " estimate.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _row(benchmark: Mapping[str, Any], program: str) -> tuple[str, ...]:
    figures = benchmark[program]
    memory = figures["device_bytes"] or figures["memory_bytes"]
    return (
        program.replace("_", "."),
        f"{figures['compile_seconds']:.2f}" if figures["compile_seconds"] is not None else "",
        spell(figures["steps_per_second"]),
        f"{figures['examples_per_second']['median']:,.0f}",
        f"{1e3 * figures['seconds_per_step_and_seed']['median']:.3g}",
        f"{memory / 1e6:,.0f}" if memory else "",
        f"{figures['flop_share']['median']:.1%}" if figures["flop_share"] else "",
        spell(figures["ratio"]) if "ratio" in figures else "",
    )


if __name__ == "__main__":
    cli.run(main)
