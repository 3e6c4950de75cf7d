"""The one place that knows of devices: the mesh `seed` × `data`, where arrays lie, several hosts."""

import contextlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import chex
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlab.core import Batch, UserError
from jaxlab.train.lost_hosts import relay_stderr

SEED, DATA = "seed", "data"
# Seconds without a sign of life after which JAX gives a process up and ends the others.
HEARTBEAT_TIMEOUT = 30
T = TypeVar("T")


def initialize_hosts() -> None:
    """Joins the other hosts of a multi-host run; does nothing on a single one.

    On a TPU pod and under SLURM everything is found in the environment. Elsewhere the variables
    COORDINATOR_ADDRESS (host:port), NUM_PROCESSES and PROCESS_ID say it.
    """
    if "COORDINATOR_ADDRESS" in os.environ:
        missing = [name for name in ("NUM_PROCESSES", "PROCESS_ID") if not os.environ.get(name, "").isdigit()]
        if missing:
            raise UserError(
                f"environment: beside COORDINATOR_ADDRESS set {' and '.join(missing)} to a number."
            )
        where = {
            "coordinator_address": os.environ["COORDINATOR_ADDRESS"],
            "num_processes": int(os.environ["NUM_PROCESSES"]),
            "process_id": int(os.environ["PROCESS_ID"]),
        }
    elif int(os.environ.get("SLURM_NTASKS", 1)) > 1 or _on_tpu():
        where = {}  # JAX finds it out
    else:
        return
    relay_stderr()
    try:
        jax.distributed.initialize(**where, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT)
    except (ValueError, IndexError) as error:
        raise UserError(
            f"environment: it does not say where the other processes are ({error}); under SLURM start it"
            " with srun, elsewhere set COORDINATOR_ADDRESS=host:port, NUM_PROCESSES and PROCESS_ID=0, 1, ..."
        ) from error


def _on_tpu() -> bool:
    """Whether this is a host with TPUs, of a pod perhaps: JAX asks the machine's metadata how many there are.

    JAX sets TPU_SKIP_MDS_QUERY as it is imported on a machine without TPUs; GKE sets it too.
    """
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] not in ("", "tpu"):
        return False
    metadata = "TPU_SKIP_MDS_QUERY" not in os.environ
    named = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return importlib.util.find_spec("libtpu") is not None and (metadata or named)


@contextlib.contextmanager
def outlasting_lost_hosts() -> Iterator[None]:
    """Within it, an error that comes of another host having gone waits for JAX to end this process.

    JAX says it in one line (see `lost_hosts`), the error seldom does.
    """
    try:
        yield
    except Exception as error:
        if jax.distributed.is_initialized() and _tells_of_another_host(error):
            time.sleep(1.5 * HEARTBEAT_TIMEOUT)
        raise


def _tells_of_another_host(error: BaseException | None) -> bool:
    return error is not None and (
        any(name in str(error) for name in ("Gloo", "NCCL", "Barrier", "CoordinationService"))
        or _tells_of_another_host(error.__cause__ or error.__context__)
    )


def spread_over_cores(seeds: int) -> None:
    """Makes devices of a CPU's cores, over which `make_mesh` spreads so many seeds; other platforms stay.

    To be called before JAX computes anything. Where XLA_FLAGS or JAX_NUM_CPU_DEVICES say how many devices a
    CPU is, that is left alone, and on several hosts too.

    Seeds on a core each need not wait for each other's small operations. Measured with jaxlib 0.10.2 on two
    hyper-threads, ms a step of all seeds on one device and on two: learning from failure, 8 seeds, 6.7 to 9.8
    and 3.9 to 5.2 (digits), 61 to 68 and 55 to 57 (28×28); ResNet-20, 2 seeds, 1,451 to 1,537 and 1,140 to
    1,234.
    """
    told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if told or jax.config.jax_num_cpu_devices > 0 or jax.distributed.is_initialized():
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):  # JAX has computed something, in a notebook perhaps
        jax.config.update("jax_num_cpu_devices", largest_divisor(seeds, cores))


def _devices_are_cores() -> bool:
    one_host = jax.process_count() == 1
    return one_host and jax.default_backend() == "cpu" and jax.config.jax_num_cpu_devices > 0


def largest_divisor(number: int, most: int) -> int:
    """Into how many equal parts, at most so many, a number of things can be split."""
    return max(divisor for divisor in range(1, most + 1) if number % divisor == 0)


def make_mesh(seed: int, data: int, *, seeds: int, batch_size: int, place: str = "config") -> Mesh:
    """Lays the devices out as `seed` × `data`; -1 for one of them means all that are left.

    The default, 1 × -1, spreads seeds where the devices are a CPU's cores (see `spread_over_cores`): they are
    slower where they share a batch. `place` is where in the config the settings stand, for messages.

    Raises:
      UserError: too few devices, or `seeds` or `batch_size` is not a multiple of its axis.
    """
    available = jax.device_count()
    if (seed, data) == (1, -1) and _devices_are_cores():
        seed, data = largest_divisor(seeds, available), 1
    if seed == -1:
        seed = max(1, available // max(data, 1))
    if data == -1:
        data = max(1, available // seed)
    if seed < 1 or data < 1:
        raise UserError(f"{place}.devices: seed={seed}, data={data}; give positive numbers, or -1 for one.")
    if seed * data > available:
        raise UserError(
            f"{place}.devices: seed={seed} × data={data} asks for more than the {available} devices."
        )
    if seeds % seed:
        raise UserError(
            f"{place}.seeds: {seeds} is not a multiple of devices.seed={seed}; change one of them."
        )
    if batch_size % data:
        raise UserError(
            f"{place}.batch_size: {batch_size} is not a multiple of devices.data={data};"
            f" change it, or set {place}.devices.data."
        )
    devices = np.asarray(jax.devices()[: seed * data]).reshape(seed, data)
    return Mesh(devices, (SEED, DATA))


def evaluation_mesh(mesh: Mesh) -> Mesh:
    """A run's devices as evaluations use them: all split a batch, or one of a CPU's cores has it.

    That one computes with the threads of all.
    """
    every = mesh.devices.reshape(1, -1)
    return Mesh(every[:, :1] if _devices_are_cores() else every, (SEED, DATA))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_seeds(mesh: Mesh) -> NamedSharding:
    """The leading axis over the seeds, the rest on every device of a seed."""
    return NamedSharding(mesh, PartitionSpec(SEED))


def batch_shardings(batch: chex.ArrayTree, mesh: Mesh, *leading: str | None) -> chex.ArrayTree:
    """How a batch is split over the devices, array by array.

    The split axis is the first, or the second of environments [E, n, ...] that are fewer than the devices.
    An array that the devices do not divide is whole on each. `leading` names the axes before the batch's.
    """
    devices = mesh.shape[DATA]

    def sharding(array: Any) -> NamedSharding:
        shape = np.shape(array)[len(leading) :]
        split: tuple[str | None, ...] = ()
        if shape and shape[0] % devices == 0:
            split = (DATA,)
        elif len(shape) > 1 and shape[0] < devices and shape[1] % devices == 0:
            split = (None, DATA)
        return NamedSharding(mesh, PartitionSpec(*leading, *split))

    return jax.tree.map(sharding, batch)


def put(tree: chex.ArrayTree, shardings: chex.ArrayTree) -> chex.ArrayTree:
    """`jax.device_put`, also where a sharding spans hosts that each hold the whole value."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(array: Any, sharding: NamedSharding) -> jax.Array:
        if jax.dtypes.issubdtype(getattr(array, "dtype", np.float32), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(array), sharding))
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return jax.device_put(array, sharding)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree, shardings)


class Layout(NamedTuple):
    """How a program with a leading seed axis is laid over devices.

    Attributes:
      compile: `compile(function, in_axes, donate)` compiles a function of those seeds that share a place of
        the mesh. Its arguments have a seed axis (in_axes 0) or not (None); all its results have one.
      split: a batch, in such a function, as it is split over the devices of a seed.
      scatter: from arrays with leading axis [seeds] to how the compiled functions hold them.
      gather: the inverse.
      replicate: arrays without a seed axis to every device.
    """

    compile: Callable[[Callable, Sequence[int | None], tuple[int, ...]], Callable]
    split: Callable[[Batch], Batch]
    scatter: Callable[[chex.ArrayTree], chex.ArrayTree]
    gather: Callable[[chex.ArrayTree], chex.ArrayTree]
    replicate: Callable[[chex.ArrayTree], chex.ArrayTree]


def mesh_layout(mesh: Mesh) -> Layout:
    """`jit` over both axes: `shard_map` over the seeds, and the compiler splits what each of them computes.

    Left to the compiler too, the convolutions of seeds on different devices would be a grouped one: with
    one seed on each of 2 CPU devices, a step of ResNet-20 took 17 s in place of 2.4.
    """
    seed, whole = PartitionSpec(SEED), PartitionSpec()
    by_seed = mesh.abstract_mesh.update_axis_types({SEED: AxisType.Manual})

    def compile_function(
        function: Callable, in_axes: Sequence[int | None], donate: tuple[int, ...]
    ) -> Callable:
        mapped = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=tuple(whole if axis is None else seed for axis in in_axes),
            out_specs=seed,
            axis_names={SEED},
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=donate, out_shardings=over_seeds(mesh))

    def split(batch: Batch) -> Batch:
        shardings = batch_shardings(batch, mesh)
        within = jax.tree.map(lambda sharding: NamedSharding(by_seed, sharding.spec), shardings)
        return jax.lax.with_sharding_constraint(batch, within)

    return Layout(
        compile_function,
        split=split,
        scatter=lambda tree: put(tree, over_seeds(mesh)),
        gather=lambda tree: tree,
        replicate=lambda tree: put(tree, replicated(mesh)),
    )


def pmap_layout(mesh: Mesh) -> Layout:
    """`jax.pmap` over the seed axis; a device holds a block of seeds and no batch is split."""
    if mesh.shape[DATA] != 1:
        raise UserError("config.devices: the pmap backend splits seeds only; set config.devices.data=1.")
    if jax.process_count() > 1:
        raise UserError("config.backend: pmap runs on one host; use 'mesh' for several.")
    devices = list(mesh.devices[:, 0])

    def compile_function(
        function: Callable, in_axes: Sequence[int | None], donate: tuple[int, ...]
    ) -> Callable:
        return jax.pmap(function, in_axes=tuple(in_axes), donate_argnums=donate, devices=devices)

    def by_device(tree: chex.ArrayTree) -> chex.ArrayTree:
        return jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), tree)

    def join(tree: chex.ArrayTree) -> chex.ArrayTree:
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)

    return Layout(
        compile_function,
        split=lambda batch: batch,
        scatter=lambda tree: put(by_device(tree), over_seeds(mesh)),
        gather=jax.jit(join, out_shardings=over_seeds(mesh)),
        replicate=lambda tree: put(tree, replicated(mesh)),
    )


def on_primary(action: Callable[[], T]) -> T | None:
    """Does something on the first host only, and raises on all hosts what it raises there.

    A host that went on alone would wait for the first one for ever.
    """
    if jax.process_count() == 1:
        return action()
    result, error, message = None, None, b""
    if jax.process_index() == 0:
        try:
            result = action()
        except Exception as raised:
            error, message = raised, (str(raised) or type(raised).__name__).encode()[:1000]
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(message.ljust(1000, b"\0"), np.uint8))
    if error is not None:
        raise error
    if (text := np.asarray(told).tobytes().rstrip(b"\0")) != b"":
        raise UserError(text.decode(errors="replace"))
    return result


def all_hosts(condition: bool) -> bool:
    """Whether a condition holds on every host."""
    if jax.process_count() == 1:
        return condition
    return bool(np.all(multihost_utils.process_allgather(np.asarray(condition))))


def fetch(array: jax.Array) -> np.ndarray:
    """The whole value of an array on this host, also where parts of it lie on other hosts."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
