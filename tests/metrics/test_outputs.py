import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.metrics.outputs import collect_outputs, map_rows


def _dataset(size: int) -> dict[str, np.ndarray]:
    image = np.arange(size * 4, dtype=np.uint8).reshape(size, 2, 2, 1)
    return {"image": image, "label": np.arange(size, dtype=np.int32)}


@pytest.mark.parametrize(("size", "shape"), [(7, (3,)), (6, (3,)), (2, (2,)), (1, (1,))])
def test_every_row_once_in_order_with_one_static_shape(size, shape):
    seen = []

    @jax.jit
    def predict(state, batch):
        seen.append(batch["index"].shape)  # runs once a compilation
        return {"logits": state + batch["index"], "label": batch["label"], "image": batch["image"]}

    dataset = _dataset(size)
    outputs = collect_outputs(predict, 10, dataset, batch_size=3, keys=("logits", "label", "image"))
    np.testing.assert_array_equal(outputs["logits"], 10 + np.arange(size))
    np.testing.assert_array_equal(outputs["label"], dataset["label"])
    np.testing.assert_array_equal(outputs["image"], dataset["image"])
    assert outputs["image"].dtype == np.uint8
    assert seen == [shape]


def test_transforms_run_in_turn_without_a_key_and_compile_once_over_calls():
    traced = []

    def to_float(batch, key):
        assert key is None
        traced.append("to_float")
        return {**batch, "image": batch["image"].astype(jnp.float32) / 255}

    def shift(batch, key):
        traced.append("shift")
        return {**batch, "image": batch["image"] - 0.5}

    def predict(state, batch):
        return {"logits": batch["image"].reshape(len(batch["image"]), -1)}

    dataset = _dataset(5)
    for _ in range(3):
        outputs = collect_outputs(jax.jit(predict), None, dataset, batch_size=2, transforms=(to_float, shift))
    expected = dataset["image"].reshape(5, 4) / np.float32(255) - 0.5
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-6)
    assert traced == ["to_float", "shift"]


def test_a_data_set_keeps_its_own_index():
    dataset = _dataset(3) | {"index": np.asarray([40, 7, 9])}
    outputs = collect_outputs(lambda _, batch: batch, None, dataset, batch_size=2, keys=("index",))
    np.testing.assert_array_equal(outputs["index"], [40, 7, 9])


def test_bad_input_is_named():
    with pytest.raises(UserError, match="dataset: it has no rows"):
        collect_outputs(lambda _, batch: batch, None, _dataset(0))
    with pytest.raises(UserError, match=r"no output 'logit'\. Did you mean 'logits'"):
        collect_outputs(lambda _, batch: {"logits": batch["label"]}, None, _dataset(2), keys=("logit",))


@pytest.mark.parametrize("size", [7, 6, 2, 1])
def test_map_rows_computes_what_collect_outputs_collects_for_many_variables_at_once(size):
    dataset, seeds = _dataset(size), np.float32([0.5, 2.0, -1.0])

    def to_float(batch, key):
        assert key is None
        return {**batch, "image": batch["image"].astype(jnp.float32) / 255}

    def predict(scale, batch):
        return {"logits": scale * batch["image"].reshape(len(batch["image"]), -1), "label": batch["label"]}

    @jax.jit
    @jax.vmap
    def mapped(scale):
        return map_rows(lambda b: predict(scale, b), dataset, batch_size=3, transforms=(to_float,))

    outputs = mapped(seeds)
    for i, scale in enumerate(seeds):
        expected = collect_outputs(
            jax.jit(predict),
            scale,
            dataset,
            batch_size=3,
            transforms=(to_float,),
            keys=("logits", "label"),
        )
        np.testing.assert_allclose(outputs["logits"][i], expected["logits"], rtol=1e-6)
        np.testing.assert_array_equal(outputs["label"][i], expected["label"])


def test_map_rows_sees_one_batch_at_a_time_and_every_output_keeps_its_kind():
    shapes = []

    def function(batch):
        shapes.append(batch["image"].shape)
        return batch["label"] % 2 == 0, (batch["image"],)

    even, (image,) = jax.jit(lambda: map_rows(function, _dataset(7), batch_size=3))()
    assert set(shapes) == {(3, 2, 2, 1)}
    np.testing.assert_array_equal(even, [True, False] * 3 + [True])
    np.testing.assert_array_equal(image, _dataset(7)["image"])
    assert (even.dtype, image.dtype) == (bool, np.uint8)
