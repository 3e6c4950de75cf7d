"""What every command shares: errors in one line, config overrides, JSON files, JAX's settings."""

import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import logging as absl_logging

from jaxlab.core import UserError
from jaxlab.train import devices


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a command and exits with its status; a `UserError` or `OSError` becomes one line and a status."""
    try:
        with devices.outlasting_lost_hosts():
            status = main()
    except UserError as error:
        status = _fail(str(error), error.status)
    except BrokenPipeError:  # the reader of a pipe has gone: nobody is left to read an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except OSError as error:
        if error.strerror is None:
            raise
        status = _fail(f"{error.filename or 'a file'}: {error.strerror}")
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        status = 1
    if status and jax.distributed.is_initialized():
        # An orderly exit would wait for the other hosts, which may be waiting for this one. They end with
        # the first, so that it lets them have their say.
        sys.stdout.flush()
        if jax.process_index() == 0:
            time.sleep(2)
        os._exit(status)
    sys.exit(status)


def overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Reads what follows a command's own options: `--config.method.q=0.5`, or with a space for the `=`.

    Raises:
      UserError: an argument that is no override of a config key.
    """
    found = {}
    remaining = iter(arguments)
    for argument in remaining:
        key, equals, value = argument.partition("=")
        if not key.startswith("--config."):
            raise UserError(f"{argument}: not an option of this command; see --help.")
        if not equals:
            value = next(remaining, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{argument}: needs a value, {argument}=VALUE.")
        found[key.removeprefix("--config.")] = value
    return found


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def set_up_jax() -> None:
    """Joins the other hosts, turns the persistent compilation cache on, quietens libraries."""
    logging.getLogger("jax").setLevel(logging.ERROR)
    devices.initialize_hosts()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    # Orbax logs through absl what it raises too, and its failures are told in one line of ours.
    absl_logging.set_verbosity(absl_logging.FATAL)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlab" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _fail(message: str, status: int = UserError.status) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status
