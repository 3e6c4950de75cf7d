"""The PyTorch counterpart of learning from failure does the same work as ours."""

import jax
import numpy as np
import optax
import pytest

from jaxlab.methods.debiasing.lff import lff
from jaxlab.nn.mlp import mlp

DATA = dict(name="streams.resident", transforms=[dict(name="transforms.standardize", scale=16.0)])


@pytest.fixture
def columns():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 17, (24, 2, 2, 1), dtype=np.uint8)
    return {"image": image, "label": rng.integers(0, 3, 24).astype(np.int32)}


@pytest.fixture
def config(columns, tmp_path):
    """As the measured process is given it: data sets are files."""
    np.savez(tmp_path / "0.npz", **columns)
    return dict(
        network=dict(name="mlp", num_classes=3, hidden=[8]),
        method=dict(name="debiasing.lff", dataset=dict(name="somewhere")),
        optimizer=dict(name="adam", learning_rate=0.02),
        data={**DATA, "dataset": str(tmp_path / "0.npz")},
        batch_size=6,
        accumulate_steps=1,
        clip_norm=0.0,
        seed=0,
        seeds=2,
    )


def variables_of(module):
    """The variables of our network that has the weights of a PyTorch one."""
    layers = {name: module.get_submodule(name) for name in ("dense1", "head")}
    params = {
        name: {"kernel": layer.weight.detach().numpy().T.copy(), "bias": layer.bias.detach().numpy().copy()}
        for name, layer in layers.items()
    }
    return {"params": params}


@pytest.mark.parametrize(
    "keys", [{}, {"q": 0.4, "decay": 0.2}, {"biased_loss": "cross_entropy"}], ids=["", "q", "cross_entropy"]
)
def test_the_losses_of_three_epochs_agree_with_ours(keys, columns, config):
    torch = pytest.importorskip("torch")
    from third_party.torch_counterparts.debiasing_lff import make_update
    from third_party.torch_counterparts.networks import make_network

    order = np.concatenate([np.random.default_rng(epoch).permutation(24) for epoch in range(3)])
    ours, theirs = [], []
    for index in np.split(order, 12):
        image, label = np.float32(columns["image"][index]) / 16, columns["label"][index]
        ours.append({"image": image, "label": label, "index": np.int32(index)})
        theirs.append(
            {
                "image": torch.from_numpy(image).movedim(-1, 1),
                "label": torch.from_numpy(label).long(),
                "index": torch.from_numpy(index),
            }
        )

    torch.manual_seed(0)
    debiased = make_network(config["network"], (1, 2, 2))
    variables = variables_of(debiased)
    torch.manual_seed(1)
    biased_variables = variables_of(make_network(config["network"], (1, 2, 2)))
    torch.manual_seed(1)  # for the biased network once more
    update = make_update(config, debiased, theirs[0], dataset=None, **keys)
    expected = [float(update(batch)) for batch in theirs]

    method = lff(mlp(3, hidden=(8,)), optax.adam(0.02), dataset=columns, num_classes=3, **keys)
    state = jax.jit(method.init)(jax.random.key(0), ours[0])
    state = state._replace(variables=variables, biased_variables=biased_variables)
    compiled_update, losses = jax.jit(method.update), []
    for batch in ours:
        state, metrics = compiled_update(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    expected_kernel = variables_of(debiased)["params"]["head"]["kernel"]
    np.testing.assert_allclose(state.variables["params"]["head"]["kernel"], expected_kernel, atol=1e-4)


def test_batches_tell_where_their_examples_are_in_the_data_set(columns, config):
    pytest.importorskip("torch")
    from third_party.torch_counterparts.data import make_sample

    batch = make_sample(config["data"], batch_size=40, device="cpu")()
    index = batch["index"].numpy()
    np.testing.assert_array_equal(batch["label"], columns["label"][index])
    images = batch["image"].movedim(1, -1).numpy()
    np.testing.assert_allclose(images, columns["image"][index] / np.float32(16), rtol=1e-6)


def test_the_measured_process_can_step(config):
    pytest.importorskip("torch")
    from third_party.torch_counterparts.__main__ import make_step

    step = make_step(config, "cpu")
    for _ in range(3):
        step()


def test_clipping_each_network_has_no_counterpart(config):
    pytest.importorskip("torch")
    from third_party.torch_counterparts import NoCounterpart
    from third_party.torch_counterparts.__main__ import make_step

    with pytest.raises(NoCounterpart, match="clip_norm"):
        make_step({**config, "clip_norm": 1.0}, "cpu")
