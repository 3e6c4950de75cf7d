"""Run folders as `launch.train` leaves them."""

import json

import pytest


@pytest.fixture
def write_run(tmp_path):
    """`write_run(name, evals, ...)` writes a run folder and returns it; no `evals`, no result.json."""

    def write(name, evals=None, *, history=(), **config):
        workdir = tmp_path / name
        workdir.mkdir(parents=True)
        seeds = max((len(values) for values in (evals or {}).values()), default=1)
        config = {"seed": 0, "seeds": seeds, "steps": 10, **config}
        (workdir / "config.json").write_text(json.dumps(config))
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
        if evals is not None:
            result = {
                "status": "complete",
                "step": 10,
                "seeds": list(range(seeds)),
                "config": config,
                "environment": {"jax": "0.0", "command": f"python -m launch.train --workdir {name}"},
                "evals": {
                    key: {"mean": None, "stderr": None, "values": values} for key, values in evals.items()
                },
            }
            (workdir / "result.json").write_text(json.dumps(result))
        return workdir

    return write
