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
