"""Checkpoints through Orbax: asynchronous, atomic, verified when they are read."""

import errno
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxlab.core import UserError
from jaxlab.core.errors import nearest
from jaxlab.train import devices

logger = logging.getLogger(__name__)

# What may differ between a run and its continuation: it changes where and how fast, not what.
_NOT_COMPARED = re.compile(r"(stages\.[^.]+\.)?(backend|data_dir|devices|max_to_keep|steps_per_call)(\.|$)")


class Checkpoints:
    """The checkpoints of one run.

    Each holds the state, its step, its config and a checksum of the state. The newest `max_to_keep` are
    kept, and the best by `best_metric` where one is named. Opened `read_only` nothing on the disk is
    changed, so that a run's checkpoints can be read while it writes more.
    """

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        *,
        max_to_keep: int = 2,
        best_metric: str | None = None,
        best_mode: str = "max",
        read_only: bool = False,
    ):
        self._directory = directory
        self._read_only = read_only
        self._config = config
        self._best_metric, self._best_sign = best_metric, 1.0 if best_mode == "max" else -1.0
        policies = [checkpoint_managers.LatestN(max_to_keep)]
        if best_metric:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=self._rank,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                enable_async_checkpointing=True,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                # Without it Orbax would not write the metric to the disk, where a resumed run finds it.
                best_fn=self._rank if best_metric else None,
            ),
            item_names=("state", "about"),
        )

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def best_step(self) -> int:
        """The step of the best checkpoint by `best_metric`, the newer one of equals.

        Raises:
          UserError: no metric is named, or no checkpoint has it yet.
        """
        if not self._best_metric:
            raise UserError(
                f"{self._directory}: config.best_metric is not set; give the step of a checkpoint."
            )
        best = self._manager.best_step()
        if best is None:
            raise UserError(
                f"{self._directory}: no checkpoint with an evaluation of '{self._best_metric}' yet."
            )
        return best

    def save(self, step: int, state: chex.ArrayTree, metrics: Mapping[str, float] | None = None) -> None:
        """Starts writing a checkpoint; returns once the state is copied.

        `metrics` are those of an evaluation at this step, if there was one.
        """
        if step in self._manager.all_steps():
            return
        about = {"step": step, "config": dict(self._config), "checksum": int(checksum(state))}
        best = None
        if self._best_metric and metrics is not None:
            if self._best_metric not in metrics:
                known = ", ".join(metrics) or "none"
                raise UserError(
                    f"config.best_metric: no '{self._best_metric}' is evaluated;"
                    f"{nearest(self._best_metric, metrics)} there are: {known}."
                )
            best = {self._best_metric: metrics[self._best_metric]}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
        self._guarded(lambda: self._manager.save(step, args=arguments, metrics=best, force=True))

    def wait(self) -> None:
        """Returns once everything is on the disk."""
        self._guarded(self._manager.wait_until_finished)

    def close(self) -> None:
        self._guarded(self._manager.close)

    def restore(self, abstract: chex.ArrayTree, step: int | None = None) -> tuple[int, chex.ArrayTree] | None:
        """Reads the checkpoint of `step`, or the newest that can be read.

        Unreadable ones are reported, moved aside (unless `read_only`) and passed over.

        Args:
          abstract: shapes, dtypes and shardings of the state.
          step: which checkpoint; the newest if None.

        Returns:
          The step and the state, or None if there is no checkpoint.

        Raises:
          UserError: the checkpoint is of another config, or `step` has no readable checkpoint.
        """
        if step is not None and step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self._directory}: no checkpoint of step {step}; there are: {have}.")
        candidates = [step] if step is not None else self.steps()[::-1]
        for candidate in candidates:
            restored, reason = None, ""
            try:
                restored = self._read(candidate, abstract)
            except UserError:
                raise
            except Exception as error:  # whatever Orbax, TensorStore or JSON make of a damaged file
                reason = _first_line(error)
            if devices.all_hosts(restored is not None):
                return candidate, restored
            reason = reason or "another host cannot read it"
            if step is not None:
                raise UserError(f"{self._directory}/{step}: cannot be read ({reason}).")
            if self._read_only:
                logger.warning("checkpoint of step %d cannot be read (%s)", candidate, reason)
            else:
                self._move_aside(candidate, reason)
        if self._read_only:
            self._manager.reload()
            if self.steps()[::-1] != candidates:  # the run has replaced them in the meantime
                return self.restore(abstract)
        return None

    def _read(self, step: int, abstract: chex.ArrayTree) -> chex.ArrayTree:
        about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
        differing = differences(about["config"], self._config)
        if differing:
            raise UserError(
                f"{self._directory}/{step}: checkpoint of another config: {'; '.join(differing)}."
                " Use another workdir, or the config it was started with."
            )
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        ).state
        if about["step"] != step:
            raise ValueError(f"it says it is of step {about['step']}")
        if about["checksum"] != int(checksum(restored)):
            raise ValueError("its checksum does not fit its arrays")
        return restored

    def _rank(self, metrics: Mapping[str, float]) -> float:
        return self._best_sign * metrics[self._best_metric]

    def _move_aside(self, step: int, reason: str) -> None:
        aside = self._directory.parent / "checkpoints.unreadable"

        def move() -> None:
            aside.mkdir(exist_ok=True)
            number = sum(1 for _ in aside.glob(f"{step}-*"))
            (self._directory / str(step)).rename(aside / f"{step}-{number}")
            logger.warning(
                "checkpoint of step %d cannot be read (%s): moved to %s, using the one before",
                step,
                reason,
                aside,
            )

        devices.on_primary(move)
        self._manager.reload()

    def _guarded(self, write: Any) -> None:
        try:
            write()
        except Exception as error:  # Orbax raises what its threads and TensorStore raised
            causes = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS))
            reason = next((cause for cause in causes if cause in str(error)), _first_line(error))
            raise UserError(
                f"{self._directory}: writing a checkpoint failed ({reason});"
                " free space or mend permissions, then run the same command again: it goes on from"
                f" step {max(self._readable_steps(), default=0)}."
            ) from error

    def _readable_steps(self) -> list[int]:
        return [int(path.name) for path in self._directory.glob("[0-9]*") if path.name.isdigit()]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


@jax.jit
def checksum(tree: chex.ArrayTree) -> jax.Array:
    """A uint32 over all bits of a tree, the same however the tree is laid over devices."""
    total = jnp.uint32(0)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if leaf.dtype == jnp.bool_:
            leaf = leaf.astype(jnp.uint8)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            leaf = jnp.stack([leaf.real, leaf.imag])
        words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{min(leaf.dtype.itemsize, 4) * 8}"))
        words = words.reshape(-1).astype(jnp.uint32)
        # Each word is scrambled with its place before the sum, so that changes do not cancel in it.
        scrambled = _scramble(_scramble(jnp.arange(words.size, dtype=jnp.uint32)) ^ words)
        total = _scramble(total ^ jnp.uint32(number)) + jnp.sum(scrambled, dtype=jnp.uint32)
    return total


def _scramble(words: jax.Array) -> jax.Array:
    """A bijection of uint32 that spreads every bit (the finalizer of MurmurHash3)."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two configs, as "key: old → new", leaving out what does not change a result."""
    old, new = (
        {key: value for key, value in _flatten(config) if not _NOT_COMPARED.match(key)}
        for config in (old, new)
    )
    return [
        f"{key}: {old.get(key, 'absent')} → {new.get(key, 'absent')}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key, KeyError) != new.get(key, KeyError)
    ]


def _flatten(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [pair for key in value for pair in _flatten(value[key], f"{path}.{key}" if path else key)]
    if isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value):
        return [pair for i, v in enumerate(value) for pair in _flatten(v, f"{path}[{i}]")]
    return [(path, list(value) if isinstance(value, tuple) else value)]
