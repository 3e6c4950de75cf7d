"""One program, many seeds, steps and devices: it computes what each seed alone computes on one device."""

import contextlib
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import Method, Stream, UserError
from jaxlab.train import devices, loop
from jaxlab.train import program as train_program
from jaxlab.train.checkpoints import Checkpoints
from jaxlab.train.evaluation import make_evaluate
from jaxlab.train.loop import _has_nan
from jaxlab.train.program import _equations, _hoist_constants, _work, check_fit, replica_keys
from tests import toy
from tests.train.parts import BATCH_SIZE, assert_close, assert_equal, make, run


@pytest.fixture(scope="module")
def single_device():
    return run(make(seeds=4))


def test_many_seeds_equal_as_many_runs_of_one(single_device):
    for i in range(4):
        alone = run(make(seed=i, seeds=1))
        assert_close(jax.tree.map(lambda x: x[0], alone), jax.tree.map(lambda x, i=i: x[i], single_device))


@pytest.mark.parametrize("mesh", [(1, 8), (4, 1), (2, 4), (2, 2)], ids=str)
def test_a_program_split_over_devices_equals_one_device(mesh, single_device):
    program = make(seeds=4, mesh=mesh)
    assert_close(run(program), single_device)
    spread = {len(x.sharding.device_set) for x in jax.tree.leaves(program.init())}
    assert spread == {mesh[0] * mesh[1]}


@pytest.mark.parametrize("devices_of_pmap", [2, 4])
def test_pmap_equals_mesh(devices_of_pmap, single_device):
    assert_close(run(make(seeds=4, mesh=(devices_of_pmap, 1), backend="pmap")), single_device)


def test_a_host_stream_equals_the_same_stream_on_the_device():
    on_host = make(stream=toy.blobs(BATCH_SIZE, on_device=False))
    assert on_host.steps_per_call == 1
    assert_close(run(on_host), run(make()))


def test_a_host_stream_is_split_over_devices():
    split = make(stream=toy.blobs(BATCH_SIZE, on_device=False), mesh=(2, 4))
    batch = next(iter(split.host_batches(0, 1)))
    assert batch["image"].sharding.spec == jax.sharding.PartitionSpec("seed", "data")
    assert_close(run(split), run(make()))


def test_how_steps_are_cut_into_calls_changes_no_bit():
    program = make()
    assert_equal(run(program, [(0, 12)]), run(program, [(0, 1), (1, 8), (9, 3)]))


def test_nothing_is_compiled_after_the_first_call():
    program = make()
    replicas, _ = program.call(program.init(), 0, 5, None)
    assert program.num_compiled() == 1
    for step, num_steps in ((5, 1), (6, 40), (46, 3)):
        replicas, _ = program.call(replicas, step, num_steps, None)
    program.call(program.scatter(program.gather(replicas)), 49, 2, None)
    assert program.num_compiled() == 1


def test_the_state_is_donated():
    program = make()
    replicas = program.init()
    program.call(replicas, 0, 2, None)
    assert all(x.is_deleted() for x in jax.tree.leaves(replicas))


@pytest.mark.parametrize(("seeds", "mesh"), [(1, (1, 1)), (2, (1, 1)), (2, (2, 2))])
def test_a_call_writes_the_state_where_it_was(seeds, mesh):
    """Whatever is donated and yet not written over is a copy of the state for every call."""
    program = make(seeds=seeds, mesh=mesh)
    replicas, done = program.call(program.init(), 0, 2, None)
    before = buffers(replicas)
    replicas, done = program.call(replicas, 2, 2, None)
    done.block_until_ready()
    assert buffers(replicas) == before


def buffers(replicas):
    parts = (part.data for x in jax.tree.leaves(replicas) for part in x.addressable_shards)
    return {part.unsafe_buffer_pointer() for part in parts}


@pytest.mark.parametrize("network", ["mlp", "conv_net"])
def test_between_two_lines_of_the_log_the_host_reads_nothing(network, tmp_path, monkeypatch):
    """A step that waits for the host, or the host for a step's values, costs every step that time."""
    reads = []
    value = type(jnp.zeros(())).__dict__["_value"].fget
    monkeypatch.setattr(type(jnp.zeros(())), "_value", property(lambda x: reads.append(x.shape) or value(x)))
    program = make(network=network, seeds=1, log_every=100)

    def steps(count):
        """How often device arrays are read in a run of so many steps, one line of the log and no more."""
        checkpoints = Checkpoints(tmp_path / str(count), {"steps": count})
        options = dict(
            log_every=100, eval_every=0, checkpoint_every=0, workdir=tmp_path, title="", first_seed=0
        )
        reads.clear()
        with contextlib.closing(checkpoints):
            loop.train(program._replace(steps_per_call=1), checkpoints, lambda _: {}, steps=count, **options)
        return len(reads)

    assert 0 < steps(40) == steps(10)


def test_no_step_calls_back_to_the_host():
    """Inside of a compiled step only a callback can sync with it: to read a value is an error of JAX there."""
    package = Path(train_program.__file__).parents[1]
    callback = re.compile(r"io_callback|pure_callback|debug\.(print|callback)")
    found = {path.name for path in package.rglob("*.py") if callback.search(path.read_text())}
    assert found == {"linear_probe.py"}  # its `init`: scikit-learn fits the probe, once


def test_metrics_are_summed_since_the_last_log():
    program = make(log_every=4)
    one_by_one = [run(program, [(0, n)]).metric_sums["loss"] for n in (1, 2, 3, 4, 5, 6)]
    assert np.all(np.diff(one_by_one[:4], axis=0) > 0)
    assert np.all(one_by_one[4] < one_by_one[3])  # step 4 opened a new window
    assert np.all(one_by_one[5] > one_by_one[4])


def test_the_first_step_that_is_not_finite_is_remembered_for_its_seed():
    program = make(stream=toy.exploding(BATCH_SIZE, at=5))
    assert set(np.asarray(run(program, [(0, 5)]).bad_step["loss"])) == {-1}
    assert set(np.asarray(run(program, [(0, 9)]).bad_step["loss"])) == {5}


def test_steps_with_convolutions_compile_once_and_have_fast_filter_gradients():
    """The kernel's gradient is no convolution over the whole image, unless the batch is split."""
    program = make(network="conv_net", seeds=1)
    replicas = program.init()
    for step in range(3):
        replicas, _ = program.call(replicas, step, 1, None)
    assert program.num_compiled() == 1
    if jax.default_backend() == "cpu":
        assert conv_windows(program) < conv_windows(make(network="conv_net", seeds=1, mesh=(1, 2)))


def conv_windows(program):
    """The largest window of a convolution in a call."""
    return max(equation.invars[1].aval.size for equation in convolutions(program))


def convolutions(program):
    closed = jax.make_jaxpr(lambda replicas: program.call(replicas, 0, 1, None))(program.init())
    return [e for e in _equations(closed.jaxpr) if e.primitive.name == "conv_general_dilated"]


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (2, 2)], ids=str)
def test_the_convolutions_of_seeds_are_not_grouped(mesh):
    """On different devices nowhere, in one place not on CPUs: grouped, they are several times slower there."""
    if mesh == (1, 1) and jax.default_backend() != "cpu":
        pytest.skip("needs a CPU")
    program = make(network="conv_net", mesh=mesh)
    assert {
        e.params["feature_group_count"] * e.params["batch_group_count"] for e in convolutions(program)
    } == {1}
    assert_close(run(program), run(make(network="conv_net")))


def test_convolutions_are_not_fused_in_a_loop_on_a_cpu():
    assert make().steps_per_call == 100
    assert make(network="conv_net").steps_per_call == (1 if jax.default_backend() == "cpu" else 100)


def test_stages_of_one_seed_have_keys_of_their_own():
    keys = [replica_keys(0, 2, stage) for stage in ("", "teacher", "student")]
    data = np.concatenate([jax.random.key_data(jnp.stack(k)).reshape(-1, 2) for k in keys])
    assert len({tuple(row) for row in data}) == len(data)


class Search(NamedTuple):
    """A state without a float, as a search over subsets has."""

    variables: dict
    mask: jax.Array


def search(update):
    method = Method(
        lambda key, batch: Search({}, jnp.zeros(4, bool)), update, lambda state, batch: {"mask": state.mask}
    )
    return lambda handed_over: method


def test_a_method_without_floats_network_or_metrics_runs():
    flip = search(lambda state, batch, key: (state._replace(mask=~state.mask), {}))
    replicas = run(make(make_method=flip))
    assert not np.any(replicas.state.mask)  # twelve steps
    assert not np.any(_has_nan(replicas.state))


def test_a_method_may_index_the_columns_of_a_host_stream_by_what_it_draws():
    def update(state, batch, key):
        return state, {"label": batch["label"][jax.random.permutation(key, BATCH_SIZE)][0]}

    check_fit(search(update), toy.blobs(BATCH_SIZE, on_device=False))


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (
            lambda s, b, k: (s._replace(mask=s.mask * 1.0), {}),
            r"state.mask is bool\[4\] and update's float32",
        ),
        (lambda s, b, k: (s._replace(variables={"new": s.mask}), {}), r"\['new'\] is absent and"),
        (lambda s, b, k: (s, {"loss": jnp.zeros(3)}), r"metric 'loss' has shape \(3,\)"),
        (lambda s, b, k: (s, {"loss": b["nothing"]}), "do not fit: KeyError: 'nothing'"),
    ],
)
def test_an_update_that_does_not_return_what_it_was_given_is_refused(update, message):
    with pytest.raises(UserError, match=message):
        make(make_method=search(update))


def test_arrays_that_a_stream_closes_over_are_arguments_of_the_program():
    table = jnp.arange(10_000.0)

    def lookup(i):
        return jax.lax.fori_loop(0, 3, lambda j, total: total + jnp.take(table, i + j), 0.0)

    hoisted, constants = _hoist_constants(lookup, jnp.int32(0))
    assert [c.shape for c in constants if c.ndim] == [table.shape]
    assert len(jax.jit(hoisted).lower(constants, jnp.int32(0)).as_text()) < 10_000
    assert jax.jit(hoisted)(constants, jnp.int32(4)) == lookup(4)


def test_a_batch_of_environments_is_split_along_the_first_axis_that_fits():
    mesh = devices.make_mesh(1, 8, seeds=1, batch_size=16)
    sizes = {"image": (2, 16, 3), "weight": (3,), "label": (16, 2), "odd": (12, 8, 8)}
    specs = devices.batch_shardings({name: np.zeros(size) for name, size in sizes.items()}, mesh)
    specs = {name: tuple(sharding.spec) for name, sharding in specs.items()}
    assert specs == {"image": (None, "data"), "weight": (), "label": ("data",), "odd": ()}


def test_environment_batches_split_over_devices_equal_one_device():
    inner = toy.blobs(BATCH_SIZE)

    def batch(step, key):
        return jax.tree.map(
            lambda x: x.reshape(2, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape), inner.batch(step, key)
        )

    stream = Stream(batch, on_device=True)
    assert_close(run(make(stream=stream, mesh=(1, 8))), run(make(stream=stream)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(seed=1, data=3, seeds=1, batch_size=16),
            "config.batch_size: 16 is not a multiple of devices.data=3",
        ),
        (dict(seed=2, data=1, seeds=3, batch_size=16), "config.seeds: 3 is not a multiple of devices.seed=2"),
        (dict(seed=4, data=4, seeds=4, batch_size=16), "asks for more than the 8 devices"),
        (dict(seed=0, data=1, seeds=4, batch_size=16), "positive"),
    ],
)
def test_devices_that_do_not_divide_the_work_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        devices.make_mesh(**arguments)


@pytest.mark.parametrize(("seeds", "of_cores"), [(1, (1, 1)), (6, (6, 1)), (9, (3, 1))])
def test_the_default_spreads_seeds_over_the_cores_of_a_cpu_and_batches_over_devices(
    seeds, of_cores, monkeypatch
):
    default = devices.make_mesh(1, -1, seeds=seeds, batch_size=16)
    assert default.devices.shape == devices.evaluation_mesh(default).devices.shape == (1, 8)
    monkeypatch.setattr(devices, "_devices_are_cores", lambda: True)
    spread = devices.make_mesh(1, -1, seeds=seeds, batch_size=16)
    assert spread.devices.shape == of_cores
    assert devices.evaluation_mesh(spread).devices.shape == (1, 1)


def test_evaluations_split_batches_over_the_devices_of_all_seeds():
    """And give the figures of one device, for states that lie on the devices of their seeds."""

    def evaluate(seed, data):
        images = []

        def predict(state, batch):
            image = batch["image"]
            jax.debug.inspect_array_sharding(
                image, callback=lambda s: images.append(s.shard_shape(image.shape))
            )
            return {"logits": image.sum((1, 2)) * jnp.stack(state)}

        mesh = devices.make_mesh(seed, data, seeds=4, batch_size=16)
        states = devices.put((jnp.arange(4.0), jnp.arange(4.0) - 1), devices.over_seeds(mesh))
        figures = make_evaluate(predict, {"test": toy.accuracy(count=64)}, mesh)(states)
        return images[0][0], figures

    one, eight = evaluate(1, 1), evaluate(4, 2)
    assert (one[0], eight[0]) == (64, 8)
    assert_close(eight[1], one[1])


def test_pmap_refuses_a_data_axis():
    with pytest.raises(UserError, match=r"set config.devices.data=1"):
        make(backend="pmap", mesh=(1, 2))


@pytest.mark.parametrize("network", ["mlp", "conv_net"])
def test_seeds_that_take_turns_equal_runs_of_one_and_are_compiled_once(network, monkeypatch):
    monkeypatch.setattr(train_program, "LARGE_PRODUCT", 0)
    program = make(network=network)
    in_turn = run(program)
    assert program.num_compiled() == 1
    alone = run(make(seed=1, seeds=1, network=network))
    assert_close(alone, jax.tree.map(lambda x: x[1:], in_turn))


def test_seeds_that_take_turns_equal_the_same_seeds_at_once(single_device, monkeypatch):
    monkeypatch.setattr(train_program, "LARGE_PRODUCT", 0)
    assert_close(run(make(seeds=4, mesh=(1, 4))), single_device)
    assert_close(run(make(seeds=4, mesh=(2, 1), backend="pmap")), single_device)


@pytest.mark.parametrize(("large", "batch_axis"), [(0, False), (train_program.LARGE_PRODUCT, True)])
def test_whether_seeds_take_turns_depends_on_the_largest_product(large, batch_axis, monkeypatch):
    """In turn, no matrix product has the seeds as an axis of its own."""
    products = []
    hoist = train_program._hoist_constants

    def spy(function, *example, **options):
        ranks = {
            e.outvars[0].aval.ndim
            for e in _equations(jax.make_jaxpr(function)(*example).jaxpr)
            if e.primitive.name == "dot_general"
        }
        products.append(ranks)
        return hoist(function, *example, **options)

    monkeypatch.setattr(train_program, "_hoist_constants", spy)
    monkeypatch.setattr(train_program, "LARGE_PRODUCT", large)
    make(seeds=2)
    assert products[-1] == ({3} if batch_axis else {2})


def test_work_is_the_largest_product_at_any_depth():
    a, b = jnp.zeros((3, 5, 7)), jnp.zeros((3, 7, 11))

    def product(a, b):
        return jnp.einsum("bij,bjk->bik", a, b)

    flops = 2 * 3 * 5 * 7 * 11
    assert _work(product, a, b) == (False, flops)
    assert _work(lambda x: x @ x, jnp.zeros(9)) == (False, 2 * 9)
    assert _work(jnp.tanh, a) == (False, 0)
    both = _work(lambda a, b: (product(a, b), a[0, :2] @ b[0]), a, b)
    assert both == (False, flops)
    _, largest = _work(jax.jit(jax.grad(lambda a, b: product(a, b).sum(), (0, 1))), a, b)
    assert largest == flops


def convolve(image):
    return jax.lax.conv(image, jnp.ones((1, 1, 2, 2)), (1, 1), "SAME")


@pytest.mark.parametrize(
    "nest",
    [
        lambda f: f,
        jax.jit,
        jax.checkpoint,
        lambda f: lambda x: jax.lax.fori_loop(0, 2, lambda i, x: f(x), x),
        lambda f: lambda x: jax.lax.while_loop(lambda x: jnp.any(x > 0), f, x),
        lambda f: lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, length=2)[0],
        lambda f: lambda x: jax.lax.cond(jnp.any(x > 0), lambda x: x, f, x),
        lambda f: lambda x: jax.lax.map(f, x[None])[0],
        lambda f: jax.vmap(lambda x: jax.jit(f)(x[None])[0]),
        lambda f: jax.grad(lambda x: jnp.sum(jax.jit(jax.checkpoint(f))(x) ** 2)),
    ],
    ids=["alone", "jit", "checkpoint", "fori_loop", "while_loop", "scan", "cond", "map", "vmap", "grad"],
)
def test_convolutions_are_seen_in_nested_programs(nest):
    assert _work(nest(convolve), jnp.ones((1, 1, 4, 4)))[0]
    assert not _work(nest(jnp.tanh), jnp.ones((1, 1, 4, 4)))[0]
