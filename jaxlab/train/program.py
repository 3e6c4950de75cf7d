"""The compiled training program: many seeds and many steps in one call.

The number of steps of a call is traced, so that one compilation serves every distance between two events
of the loop, and a resumed run makes the same arithmetic as one that was never stopped.
"""

import collections
import math
import zlib
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core
from jax.sharding import Mesh

from jaxlab.core import Batch, Method, State, Stream, UserError
from jaxlab.train import devices
from jaxlab.train.filter_gradients import with_fast_filter_gradients

# Builds the method: given None as a run uses it, given the variables that an earlier stage handed over to
# a replica so that `init` starts from them.
MakeMethod = Callable[[Any], Method]


# From so many FLOPs in its largest matrix product on, seeds take turns on a CPU: alone, one fills the cores.
# Measured with jaxlib 0.10.2 on 2 cores, ms a step and seed of learning from failure, 8 seeds at once or in
# turn: products of 120 MFLOP 10.0 or 9.0, of 30 MFLOP 3.5 or 3.6, of 2.5 MFLOP 0.90 or 1.08.
LARGE_PRODUCT = 50_000_000


class Replica(NamedTuple):
    """One seed's training as it is checkpointed.

    Attributes:
      state: the method's state.
      metric_sums: each metric summed since the log's last line.
      bad_step: for each metric the first step at which it was not finite, or -1.
    """

    state: State
    metric_sums: dict[str, jax.Array]
    bad_step: dict[str, jax.Array]


class Keys(NamedTuple):
    """A replica's keys. They stay the same for the whole run; what needs a fresh one folds in the step."""

    init: chex.PRNGKey
    data: chex.PRNGKey
    update: chex.PRNGKey


class Program(NamedTuple):
    """The compiled functions of a run. Replicas are held as the devices want them, between the calls too.

    Attributes:
      init: `init() -> replicas`.
      call: `call(replicas, step, num_steps, batch) -> (replicas, done)` runs steps `step` to `step +
        num_steps - 1`. `replicas` is donated; `done` is a small array that is ready when the call is.
        `batch` is None, or the batch of that one step where the stream is on the host.
      host_batches: `host_batches(start, stop)` yields those batches, read ahead.
      steps_per_call: the most steps that one call runs.
      abstract: `abstract()`: shapes, dtypes and shardings of gathered replicas, nothing being computed.
      gather: replicas with leading axis [seeds], as checkpoints and evaluations take them.
      scatter: the inverse of `gather`.
      num_compiled: how many programs `call` has compiled so far.
    """

    init: Callable[[], Replica]
    call: Callable[[Replica, int, int, Batch | None], tuple[Replica, jax.Array]]
    host_batches: Callable[[int, int], Iterator[Batch | None]]
    steps_per_call: int
    abstract: Callable[[], Replica]
    gather: Callable[[Replica], Replica]
    scatter: Callable[[Replica], Replica]
    num_compiled: Callable[[], int]


def replica_keys(seed: int, seeds: int, stage: str = "") -> Keys:
    """The keys of all replicas: replica i has those of a single-seed run with seed `seed + i`.

    Stages of one run have keys of their own, so that one does not see the batches of another again.
    """
    roots = [jax.random.key(seed + i) for i in range(seeds)]
    if stage:
        roots = [jax.random.fold_in(root, zlib.crc32(stage.encode())) for root in roots]
    return Keys(*jnp.stack([jax.random.split(root, 3) for root in roots], axis=1))


def make_program(
    make_method: MakeMethod,
    stream: Stream,
    *,
    mesh: Mesh,
    seed: int,
    seeds: int,
    log_every: int,
    steps_per_call: int,
    backend: str = "mesh",
    stage: str = "",
    handed_over: chex.ArrayTree = None,
) -> Program:
    """Builds the program of a run.

    Args:
      make_method: the method, from what was handed over to a replica or None.
      stream: where batches come from.
      mesh: the devices, `seed` × `data`.
      seed: the first replica's seed.
      seeds: the number of replicas.
      log_every: metric sums start anew after each multiple of this many steps.
      steps_per_call: the most steps to fuse in one call.
      backend: "mesh" (`jit` over both axes) or "pmap" (over the seed axis).
      stage: the name of the run's stage, where it has stages.
      handed_over: from an earlier stage, with leading axis [seeds], or None.

    Raises:
      UserError: the method, its network and the batches do not fit each other.
    """
    keys = replica_keys(seed, seeds, stage)
    method = make_method(None)
    one_handed_over = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), handed_over)
    _, metrics = check_fit(make_method, stream, one_handed_over)
    layout = devices.pmap_layout(mesh) if backend == "pmap" else devices.mesh_layout(mesh)

    def init_replica(keys: Keys, handed_over: Any, batch: Batch | None) -> Replica:
        batch = stream.batch(0, keys.data) if batch is None else batch
        state = make_method(handed_over).init(keys.init, batch)
        return Replica(
            state,
            metric_sums={name: jnp.zeros((), jnp.float32) for name in metrics},
            bad_step={name: jnp.full((), -1, jnp.int32) for name in metrics},
        )

    def train_step(replica: Replica, step: jax.Array, keys: Keys, batch: Batch | None) -> Replica:
        if batch is None:
            batch = layout.split(stream.batch(step, keys.data))
        key = jax.random.fold_in(keys.update, step)
        state, metrics = method.update(replica.state, batch, key)
        metric_sums, bad_step = {}, {}
        for name, value in metrics.items():
            value = jnp.asarray(value, jnp.float32)
            metric_sums[name] = jnp.where(step % log_every == 0, 0.0, replica.metric_sums[name]) + value
            first = (replica.bad_step[name] < 0) & ~jnp.isfinite(value)
            bad_step[name] = jnp.where(first, step, replica.bad_step[name])
        return Replica(state, metric_sums, bad_step)

    def host_batch(step: int) -> Batch | None:
        """The batches of all seeds at one step, where the stream is on the host."""
        if stream.on_device:
            return None
        batches = [stream.batch(step, keys.data[i]) for i in range(seeds)]
        batch = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
        if backend == "pmap":
            return layout.scatter(batch)
        return devices.put(batch, devices.batch_shardings(batch, mesh, devices.SEED))

    def host_batches(start: int, stop: int) -> Iterator[Batch | None]:
        return _read_ahead(host_batch, range(start, stop))

    # What is given to one place of the mesh's seed axis.
    block = seeds // mesh.shape[devices.SEED]
    keys_block, handed_block, batch_block = jax.eval_shape(
        lambda tree: jax.tree.map(lambda x: x[:block], tree),
        (keys, handed_over, layout.gather(host_batch(0))),
    )
    all_init = jax.vmap(init_replica)
    replicas = jax.eval_shape(all_init, keys_block, handed_block, batch_block)
    one_replica, one_keys, one_batch = jax.tree.map(
        lambda x: jax.eval_shape(lambda x: x[0], x), (replicas, keys_block, batch_block)
    )
    one_example = (one_replica, jnp.int32(0), one_keys, one_batch)
    initial, init_constants = _hoist_constants(all_init, keys_block, handed_block, batch_block)
    convolves, largest_product = _work(train_step, *one_example)
    on_cpu = jax.default_backend() == "cpu"
    # XLA's CPU loops lose the fast convolution kernels. Measured with jaxlib 0.10.2 on 2 cores, a 3×3
    # convolution of 64×14×14×16 images and its filter gradient: 9.5 ms as one call, 172 ms in `fori_loop`,
    # 182 ms in `scan`; a 256×256 matrix product with its gradient: 2.2 ms as one call, 0.7 ms in the loop.
    fused = stream.on_device and not (on_cpu and convolves)
    # Whether the seeds take turns in place of a `vmap`. One alone does: on a CPU a batch axis of size 1
    # slows matrix products by a third. So do those that convolve there: `vmap` makes grouped convolutions.
    in_turn = block == 1 or (on_cpu and (convolves or largest_product > LARGE_PRODUCT))
    # Not where a batch is split: the products go through it part by part.
    exchange = in_turn and on_cpu and mesh.shape[devices.DATA] == 1
    if in_turn:
        function, example = train_step, one_example
    else:
        function = jax.vmap(train_step, in_axes=(0, None, 0, 0))
        example = (replicas, jnp.int32(0), keys_block, batch_block)
    one_step, step_constants = _hoist_constants(function, *example, fast_filter_gradients=exchange)

    def many_steps(constants, replicas, step, num_steps, keys, batch):
        def steps_of(replica, keys, batch):
            def body(i, replica):
                return one_step(constants, replica, i, keys, batch)

            return jax.lax.fori_loop(step, step + num_steps, body, replica) if fused else body(step, replica)

        if not in_turn:
            replicas = steps_of(replicas, keys, batch)
        elif fused and block > 1:
            replicas = jax.lax.map(lambda seed: steps_of(*seed), (replicas, keys, batch))
        else:
            each = [jax.tree.map(lambda x, i=i: x[i], (replicas, keys, batch)) for i in range(block)]
            replicas = jax.tree.map(lambda *x: jnp.stack(x), *[steps_of(*seed) for seed in each])
        # A buffer of its own, for the host to wait on: the replicas' own are donated to the next call.
        return replicas, jnp.full((block,), step + num_steps)

    compiled_init = layout.compile(initial, (None, 0, 0, 0), ())
    compiled_call = layout.compile(many_steps, (None, 0, None, None, 0, 0), (1,))
    keys_there = layout.scatter(keys)
    placed = {id(constant): layout.replicate(constant) for constant in (*init_constants, *step_constants)}

    def run_init() -> Replica:
        constants = [placed[id(constant)] for constant in init_constants]
        return compiled_init(constants, keys_there, layout.scatter(handed_over), host_batch(0))

    def abstract() -> Replica:
        sharding = devices.over_seeds(mesh)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((seeds, *x.shape[1:]), x.dtype, sharding=sharding), replicas
        )

    def run_call(
        replicas: Replica, step: int, num_steps: int, batch: Batch | None
    ) -> tuple[Replica, jax.Array]:
        constants = [placed[id(constant)] for constant in step_constants]
        return compiled_call(constants, replicas, np.int32(step), np.int32(num_steps), keys_there, batch)

    return Program(
        init=run_init,
        call=run_call,
        host_batches=host_batches,
        steps_per_call=steps_per_call if fused else 1,
        abstract=abstract,
        gather=layout.gather,
        scatter=layout.scatter,
        num_compiled=lambda: compiled_call._cache_size(),
    )


def check_fit(
    make_method: MakeMethod, stream: Stream, handed_over: chex.ArrayTree = None
) -> tuple[State, dict[str, jax.ShapeDtypeStruct]]:
    """The shapes of a replica's state and metrics, nothing being computed.

    `handed_over` may be shapes too.

    Raises:
      UserError: method, network and data do not fit each other, or `update` does not return the state it
        was given and scalars.
    """

    def init_and_update(key: chex.PRNGKey, handed_over: Any, batch: Batch | None) -> Any:
        first = stream.batch(0, key) if batch is None else batch
        state = make_method(handed_over).init(key, first)
        return state, make_method(None).update(state, first, key)

    try:
        batch = None if stream.on_device else stream.batch(0, jax.random.key(0))
        state, (updated, metrics) = jax.eval_shape(init_and_update, jax.random.key(0), handed_over, batch)
    except UserError:
        raise
    except Exception as error:  # whatever shapes, keys and sizes that do not fit lead to under tracing
        raise UserError(f"method, network and data do not fit: {type(error).__name__}: {error}") from error
    before, after = (
        {jax.tree_util.keystr(path): leaf.str_short() for path, leaf in _typed_leaves(tree)}
        for tree in (state, updated)
    )
    for name in [name for name in {**before, **after} if before.get(name) != after.get(name)]:
        raise UserError(
            f"method: init's state{name} is {before.get(name, 'absent')} and update's"
            f" {after.get(name, 'absent')}; update must return the structure, shapes and dtypes it was given."
        )
    for name in [name for name, value in metrics.items() if value.shape]:
        raise UserError(f"method: metric '{name}' has shape {metrics[name].shape}; metrics are scalars.")
    return state, metrics


def _typed_leaves(tree: chex.ArrayTree) -> list[tuple[Any, Any]]:
    return [(path, jax.typeof(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _hoist_constants(
    function: Callable, *example: Any, fast_filter_gradients: bool = False
) -> tuple[Callable, list[jax.Array]]:
    """Turns the arrays that `function` closes over (a data set, a frozen teacher) into its first argument.

    As constants of a compiled program they would be copied into it, and compiled with it.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*example)
    jaxpr = with_fast_filter_gradients(closed.jaxpr) if fast_filter_gradients else closed.jaxpr
    structure = jax.tree.structure(shape)

    def hoisted(constants: list[jax.Array], *args: Any) -> Any:
        flat = jax_core.jaxpr_as_fun(jax_core.ClosedJaxpr(jaxpr, constants))(*jax.tree.leaves(args))
        return jax.tree.unflatten(structure, flat)

    return hoisted, closed.consts


def _work(function: Callable, *example: Any) -> tuple[bool, int]:
    """Whether `function` convolves, and the FLOPs of its largest matrix product."""
    convolves, largest = False, 0
    for equation in _equations(jax.make_jaxpr(function)(*example).jaxpr):
        if equation.primitive.name == "conv_general_dilated":
            convolves = True
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            largest = max(largest, 2 * depth * math.prod(equation.outvars[0].aval.shape))
    return convolves, largest


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _read_ahead(read: Callable[[int], Any], steps: range, depth: int = 4) -> Iterator[Any]:
    """Yields `read(step)` for each step, with the next `depth` being read in threads."""
    with futures.ThreadPoolExecutor(max_workers=depth) as executor:
        pending = collections.deque(executor.submit(read, step) for step in steps[:depth])
        try:
            for step in steps[depth:]:
                yield pending.popleft().result()
                pending.append(executor.submit(read, step))
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
