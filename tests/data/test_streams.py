from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import Stream, UserError
from jaxlab.data import store, streams, transforms

KEY = jax.random.key(0)


def dataset(size):
    return {"image": np.arange(size * 4, dtype=np.uint8).reshape(size, 2, 2, 1), "label": np.arange(size)}


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (3, 8)])
def test_every_epoch_of_a_resident_stream_is_complete(size, batch_size):
    stream = streams.resident(dataset(size), batch_size=batch_size)
    steps = 5 * size  # 5 * batch_size epochs
    index = np.asarray(jax.jit(jax.vmap(lambda step: stream.batch(step, KEY)["index"]))(jnp.arange(steps)))
    epochs = index.reshape(-1, size)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(size), (len(epochs), 1)))
    assert len(np.unique(epochs, axis=0)) > 1


def test_a_resident_batch_holds_the_rows_of_its_index():
    data = dataset(50)
    batch = jax.jit(streams.resident(data, batch_size=8).batch)(3, KEY)
    assert batch["index"].dtype == jnp.int32
    for name in ("image", "label"):
        np.testing.assert_array_equal(batch[name], data[name][batch["index"]])


def test_a_resident_stream_is_a_function_of_step_and_key():
    augment = (transforms.random_flip(), transforms.standardize())
    stream = streams.resident(dataset(50), batch_size=8, transforms=augment)
    keys = jax.random.split(KEY, 3)
    compiled = jax.jit(stream.batch)
    vmapped = jax.jit(jax.vmap(stream.batch, (None, 0)))(7, keys)
    for i, key in enumerate(keys):
        alone = compiled(7, key)
        np.testing.assert_array_equal(alone["index"], vmapped["index"][i])
        np.testing.assert_allclose(alone["image"], vmapped["image"][i], rtol=1e-6)
    assert (vmapped["index"][0] != vmapped["index"][1]).any()
    assert (compiled(8, KEY)["index"] != compiled(7, KEY)["index"]).any()


def test_positions_do_not_overflow_late_in_a_run():
    compiled = jax.jit(streams.resident(dataset(10), batch_size=5).batch)
    late = [compiled(jnp.int32(2**31 - 2 + i), KEY)["index"] for i in range(2)]
    np.testing.assert_array_equal(np.sort(np.concatenate(late)), np.arange(10))


def test_what_a_resident_stream_cannot_address_is_refused():
    with pytest.raises(UserError, match=r"streams\.host"):
        streams.resident(dataset(1), batch_size=2**31)
    with pytest.raises(UserError, match="0 examples"):
        streams.resident(dataset(0), batch_size=4)


def test_a_generated_stream_has_a_new_key_at_each_step():
    stream = streams.generated(lambda key: {"x": jax.random.normal(key, (4,))})
    batches = jax.jit(jax.vmap(stream.batch, (0, None)))(jnp.arange(3), KEY)["x"]
    assert len(np.unique(batches)) == 12
    np.testing.assert_array_equal(batches[2], stream.batch(2, KEY)["x"])


def test_an_auxiliary_stream_draws_independently():
    main = streams.resident(dataset(50), batch_size=8)
    batch = jax.jit(streams.with_auxiliary(main, main).batch)(0, KEY)
    assert (batch["index"] != batch["auxiliary"]["index"]).any()
    on_host = Stream(lambda step, key: {}, on_device=False)
    with pytest.raises(UserError, match="both"):
        streams.with_auxiliary(main, on_host)


def test_every_epoch_of_a_host_stream_is_complete_and_holds_the_rows_of_its_index(data_dir):
    stream = streams.host("digits", split="test[:50]", batch_size=8, data_dir=data_dir)
    assert not stream.on_device
    batches = [stream.batch(step, KEY) for step in range(25)]
    epochs = np.concatenate([batch["index"] for batch in batches]).reshape(4, 50)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(50), (4, 1)))
    assert len(np.unique(epochs, axis=0)) == 4
    data = store.arrays("digits", "test[:50]", data_dir)
    for name in ("image", "label"):
        np.testing.assert_array_equal(batches[3][name], data[name][batches[3]["index"]])


def test_a_host_batch_does_not_depend_on_how_it_was_reached(data_dir):
    def make():
        augment = (transforms.random_crop(padding=1),)
        return streams.host("digits", split="test", batch_size=8, data_dir=data_dir, transforms=augment)

    stream, steps = make(), [5, 0, 3, 3, 1, 4, 2]
    with futures.ThreadPoolExecutor(4) as executor:
        read_ahead = dict(zip(steps, executor.map(lambda step: stream.batch(step, KEY), steps)))
    other = make()
    for step in range(6):
        batch = other.batch(step, KEY)
        assert all(isinstance(value, np.ndarray) for value in batch.values())
        jax.tree.map(np.testing.assert_array_equal, batch, read_ahead[step])
    assert (stream.batch(0, jax.random.key(1))["index"] != read_ahead[0]["index"]).any()


def test_a_sampled_stream_needs_rows():
    with pytest.raises(UserError, match="no rows"):
        streams.sampled({"label": np.zeros(0, np.int32)}, batch_size=2)


def test_a_sampled_stream_covers_the_data_set_with_replacement():
    def spy(batch, key):
        return {**batch, "key": jax.random.key_data(key)}

    data = dataset(20)
    stream = streams.sampled(data, batch_size=10, transforms=(spy,))
    steps, compiled = np.arange(200), jax.jit(jax.vmap(stream.batch, (0, None)))
    batches = jax.device_get(compiled(steps, KEY))
    index = batches["index"]
    assert index.dtype == np.int32
    for name in data:
        np.testing.assert_array_equal(batches[name], data[name][index])
    counts = np.bincount(index.ravel(), minlength=20)
    assert len(counts) == 20
    assert np.all(np.abs(counts - 100) < 50)  # 5 standard deviations
    # 1 - 20! / 10! / 20^10 of the batches have an example twice.
    assert np.mean([len(set(row)) < 10 for row in index]) > 0.85
    assert len(np.unique(batches["key"], axis=0)) == 200  # a transform has a new key at each step
    np.testing.assert_array_equal(compiled(steps[::-1], KEY)["index"], index[::-1])
    assert (compiled(steps, jax.random.key(1))["index"] != index).any(1).all()


def test_environments_are_stacked_and_draw_independently():
    one, other = dataset(50), {**dataset(50), "label": np.arange(100, 150)}
    parts = tuple(streams.sampled(data, batch_size=6) for data in (one, one, other))
    stream = streams.environments(parts)
    assert stream.on_device
    batch = jax.device_get(jax.jit(stream.batch)(3, KEY))
    assert {name: column.shape for name, column in batch.items()} == {
        "image": (3, 6, 2, 2, 1),
        "label": (3, 6),
        "index": (3, 6),
        "context": (3, 6),
    }
    assert batch["context"].dtype == np.int32
    np.testing.assert_array_equal(batch["context"], np.broadcast_to(np.arange(3)[:, None], (3, 6)))
    for e, data in enumerate((one, one, other)):
        for name in ("image", "label"):
            np.testing.assert_array_equal(batch[name][e], data[name][batch["index"][e]])
        for f in range(e):
            assert (batch["index"][e] != batch["index"][f]).any()


def test_environments_keep_a_context_that_the_data_sets_have():
    data = {**dataset(8), "context": np.arange(8) % 3}
    part = streams.sampled(data, batch_size=4)
    batch = jax.jit(streams.environments((part, part)).batch)(0, KEY)
    np.testing.assert_array_equal(batch["context"], batch["index"] % 3)


def test_environments_of_the_host_are_numpy_and_do_not_mix_with_those_of_the_device(data_dir):
    on_host = streams.host("digits", split="test", batch_size=4, data_dir=data_dir)
    stream = streams.environments((on_host, on_host))
    assert not stream.on_device
    batch = stream.batch(1, KEY)
    assert all(isinstance(column, np.ndarray) for column in batch.values())
    assert batch["label"].shape == (2, 4)
    assert (batch["index"][0] != batch["index"][1]).any()
    for parts in ((on_host, streams.sampled(dataset(4), batch_size=4)), ()):
        with pytest.raises(UserError, match="all on the device or all on the host"):
            streams.environments(parts)


def test_a_grouped_batch_has_distinct_groups_and_only_their_own_examples():
    # Groups of 1, 2, 30 and 7 examples, not numbered from 0, in no order.
    hospital = np.random.default_rng(0).permutation(np.repeat([9, 2, 5, 4], [1, 2, 30, 7]))
    data = {**dataset(40), "hospital": hospital}
    seen = []

    def spy(batch, key):
        seen.append(batch["image"].shape)
        return batch

    stream = streams.grouped(data, group="hospital", groups_per_batch=3, batch_size=8, transforms=(spy,))
    steps, compiled = np.arange(300), jax.jit(jax.vmap(stream.batch, (0, None)))
    batches = jax.device_get(compiled(steps, KEY))
    assert seen == [(24, 2, 2, 1)]
    index, context = batches["index"], batches["context"]
    assert context.shape == (300, 3, 8)
    for name in data:
        np.testing.assert_array_equal(batches[name], data[name][index])
    np.testing.assert_array_equal(context, hospital[index])
    np.testing.assert_array_equal(context, np.broadcast_to(context[..., :1], context.shape))
    assert all(len(set(groups)) == 3 for groups in context[..., 0])
    # Every group is as likely as any other, and every example of one.
    _, batches_with = np.unique(context[..., 0], return_counts=True)
    assert np.all(np.abs(batches_with - 225) < 40)
    for group, size in zip((9, 2, 5, 4), (1, 2, 30, 7)):
        _, counts = np.unique(index[context == group], return_counts=True)
        expected = counts.sum() / size
        assert len(counts) == size
        assert np.all(np.abs(counts - expected) < 6 * expected**0.5)
    np.testing.assert_array_equal(compiled(steps[::-1], KEY)["index"], index[::-1])


def test_groups_that_are_not_there_are_refused():
    data = {**dataset(4), "context": np.array([0, 0, 3, 3])}
    with pytest.raises(UserError, match="no column 'contex'.*context"):
        streams.grouped(data, group="contex", groups_per_batch=1, batch_size=2)
    for count in (0, 3):
        with pytest.raises(UserError, match=f"groups_per_batch is {count}; there are 2 groups"):
            streams.grouped(data, groups_per_batch=count, batch_size=2)
