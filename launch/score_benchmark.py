"""How long the post-hoc scores of `launch.benchmark --scores` take, beside the passes that feed them."""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxlab import experiment
from jaxlab.core import UserError, build
from jaxlab.methods.ood_detection.detection import network_head
from jaxlab.methods.ood_detection.scores import BUILDERS
from jaxlab.metrics.outputs import collect_outputs
from jaxlab.train.evaluation import environment
from launch.worker import Worker, read_task, spell, spread, torch_device

ROWS = 10_000  # that are scored
SEARCHING = "knn", "nnguide"  # meet every training example, so that they may take longer than the network

OURS = ("-c", "from launch.score_benchmark import serve; serve()")
TORCH = ("-m", "third_party.torch_counterparts.ood_scores")


def measure(
    config: Mapping[str, Any],
    stage: str = "",
    *,
    against: str | None = None,
    rounds: int,
    show: Callable[[int, str], None],
) -> dict[str, Any]:
    """Measures every score that moves no input, on the data of a stage's evaluator `ood_detection.detection`.

    Args:
      config: of the experiment or stage, checked. Its network has fresh variables.
      stage: its name, for messages.
      against: "torch", to compute the same scores of the same outputs there too; None: ours alone.
      rounds: how often each score is measured.
      show: `show(rounds_done, what_runs)`.

    Returns:
      What may be written as JSON. Times in seconds, {"median", "min", "max", "values"} over the rounds:
      `forward_seconds` of the network on the rows that are scored; `scores`, by name, of each program
      `fit_seconds` on the training set and `score_seconds`, and the `ratio` of torch to ours of the latter;
      `all` likewise, of the sums over all scores but those in `SEARCHING`.

    Raises:
      UserError: the stage has no such evaluator with a training set, or no last layer.
    """
    with contextlib.ExitStack() as stack:
        path = str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "outputs.npz")
        ours = stack.enter_context(Worker(OURS, {"config": config, "stage": stage, "path": path}))
        programs, missing = {"ours": ours}, None
        if against == "torch":
            device, missing = torch_device(ours.about["environment"]["backend"])
            if device:
                programs["torch"] = stack.enter_context(Worker(TORCH, {"path": path, "device": device}))
        names = ours.about["scores"]
        answers: dict[str, dict[str, list]] = {name: {program: [] for program in programs} for name in names}
        forward = []
        for i in range(rounds):
            forward.append(ours.ask(forward=True)["seconds"])
            for name in names:
                for program, worker in programs.items():
                    show(i, f"{program}, {name.replace('_', ' ')}")
                    answers[name][program].append(worker.ask(score=name))
    times = {
        name: {
            program: {key: np.array([answer[key] for answer in given]) for key in given[0]}
            for program, given in by_program.items()
        }
        for name, by_program in answers.items()
    }
    summed = {
        program: {
            key: sum(times[name][program][key] for name in names if name not in SEARCHING)
            for key in ("fit_seconds", "score_seconds")
        }
        for program in programs
    }
    return {
        "rounds": rounds,
        "missing": missing,
        **{program: worker.about for program, worker in programs.items()},
        "forward_seconds": spread(forward),
        "scores": {name: _figures(by_program) for name, by_program in times.items()},
        "all": _figures(summed),
    }


def _figures(times: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    figures: dict[str, Any] = {
        program: {key: spread(values) for key, values in of_program.items()}
        for program, of_program in times.items()
    }
    if "torch" in times:
        figures["ratio"] = spread(times["torch"]["score_seconds"] / times["ours"]["score_seconds"])
    return figures


def serve() -> None:
    """The process of our program: writes a fresh network's outputs to a file, then times scores of them."""
    task, reply = read_task()
    try:
        _serve(task, reply)
    except UserError as error:
        reply(error=str(error))


def _serve(task: Mapping[str, Any], reply: Callable[..., None]) -> None:
    forward, fitted_on, scored, head = _outputs(task["config"], task["stage"])
    trained = {f"train_{name}": column for name, column in fitted_on.items()}
    np.savez(task["path"], **trained, **scored, kernel=head[0], bias=head[1])
    fitted_on, scored, head = jax.device_put((fitted_on, scored, head))
    scores = {name: builder() for name, builder in BUILDERS.items()}
    programs = {
        name: (score.fit and jax.jit(score.fit), jax.jit(score.score))
        for name, score in scores.items()
        if score.perturb is None
    }
    reply(
        environment=environment(),
        rows=ROWS,
        fitted_on=len(fitted_on["label"]),
        features=head[0].shape[0],
        classes=head[0].shape[1],
        scores=list(programs),
    )
    for line in sys.stdin:
        message = json.loads(line)
        if "forward" in message:
            reply(seconds=_fastest(forward)[1])
            continue
        fit, score = programs[message["score"]]
        params, fit_seconds = None, 0.0
        if fit:
            params, fit_seconds = _fastest(fit, fitted_on, fitted_on["label"], head)
        reply(fit_seconds=fit_seconds, score_seconds=_fastest(score, params, scored, head)[1])


def _outputs(config: Mapping[str, Any], stage: str) -> tuple[Callable[[], Any], dict, dict, tuple]:
    """A function that runs the network over the rows to be scored; outputs, of training data and of these
    rows; the last layer."""
    parts = experiment.build_parts(config, stage)
    sections = [s for s in config["evaluators"].values() if s["name"] == "ood_detection.detection"]
    if not sections or "train" not in sections[0]:
        raise UserError("evaluators: --scores takes data from an 'ood_detection.detection' with 'train'.")
    (section, *_) = sections
    data_dir = config["data_dir"] or None
    train, test = (build("data", section[key], data_dir=data_dir) for key in ("train", "dataset"))
    rows = {name: np.resize(column, (ROWS, *column.shape[1:])) for name, column in test.items()}
    transforms = tuple(build("data", transform) for transform in section.get("transforms", ()))
    method, key = parts.make_method(None), jax.random.key(0)
    state = jax.jit(method.init)(key, parts.stream.batch(0, key))
    head = network_head(state)
    if head is None:
        raise UserError("network: --scores needs one with a last layer params['head'].")
    predict = jax.jit(method.predict)

    def outputs_of(dataset: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        size = section.get("batch_size", 512)
        keys = "features", "logits"
        return collect_outputs(predict, state, dataset, batch_size=size, transforms=transforms, keys=keys)

    fitted_on = {**outputs_of(train), "label": train["label"]}
    return lambda: outputs_of(rows), fitted_on, outputs_of(rows), head


def _fastest(function: Callable[..., Any], *arguments: Any, repeats: int = 3) -> tuple[Any, float]:
    """What the function returns, and the least time of a call but the first, which may compile."""
    result, times = jax.block_until_ready(function(*arguments)), []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return result, min(times)


def print_tables(console: Console, benchmarks: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Prints what `measure` returned, each under its label."""
    for label, figures in benchmarks:
        programs = [program for program in ("ours", "torch") if program in figures]
        table = Table(
            title=Text(label, "bold"), title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        table.add_column("")
        for head in [f"{program}\n{part} ms" for program in programs for part in ("fit", "score")]:
            table.add_column(head, justify="right")
        table.add_column("ratio" if "torch" in programs else "", justify="right")
        for name, of in figures["scores"].items():
            table.add_row(name.replace("_", " "), *_cells(of, programs))
        table.add_section()
        table.add_row(f"all but {' and '.join(SEARCHING)}", *_cells(figures["all"], programs))
        table.add_row("passes of the network", "", f"{1e3 * figures['forward_seconds']['median']:.3g}")
        console.print(table)
        if figures["missing"]:
            console.print(Text(f"not measured against torch: {figures['missing']}\n"), soft_wrap=True)
        ours = figures["ours"]
        console.print(
            f"{ours['rows']:,} rows of {ours['features']} features and {ours['classes']} classes scored,"
            f" fitted on {ours['fitted_on']:,}; {ours['environment']['device']}. Medians of"
            f" {figures['rounds']} rounds; ratio is torch / ours of scoring [lowest–highest].",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _cells(figures: Mapping[str, Any], programs: Sequence[str]) -> list[str]:
    times = [figures[program][key] for program in programs for key in ("fit_seconds", "score_seconds")]
    cells = [f"{1e3 * time['median']:.3g}" for time in times]
    return cells + ([spell(figures["ratio"])] if "ratio" in figures else [])
