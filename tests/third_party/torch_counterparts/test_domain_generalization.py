"""The PyTorch counterparts of domain generalisation do the same work as ours."""

import importlib

import jax
import numpy as np
import optax
import pytest

from jaxlab.core import resolve
from jaxlab.nn.mlp import mlp

CONFIG = dict(
    optimizer=dict(name="adam", learning_rate=0.01),
    accumulate_steps=1,
    clip_norm=0.0,
)
OFFICIAL = dict(loss="sigmoid", l2=0.01, anneal_steps=3, weight=50.0, rescale=True, reset_optimizer=False)


@pytest.mark.parametrize(
    ("name", "num_classes", "keys"),
    [
        ("erm", 1, dict(loss="sigmoid", l2=0.01)),
        ("irm", 1, dict(estimator="square", **OFFICIAL)),
        ("irm", 3, dict(anneal_steps=3)),
        ("vrex", 1, dict(kind="pair_square", reduction="sum", **OFFICIAL)),
        ("vrex", 3, dict(kind="pair_abs", anneal_steps=3)),
        ("vrex", 3, dict(anneal_steps=3)),
        ("group_dro", 3, dict(step_size=0.5)),
    ],
)
def test_the_losses_of_training_agree_with_ours(name, num_classes, keys):
    torch = pytest.importorskip("torch")
    from third_party.torch_counterparts.networks import make_network

    rng = np.random.default_rng(0)
    images = rng.normal(size=(8, 2, 6, 2, 2, 1)).astype(np.float32)
    labels = rng.integers(0, max(num_classes, 2), (8, 2, 6))
    torch.manual_seed(0)
    module = make_network(dict(name="mlp", num_classes=num_classes, hidden=[8]), (1, 2, 2))
    params = {
        layer: {
            "kernel": module.get_submodule(layer).weight.detach().numpy().T.copy(),
            "bias": module.get_submodule(layer).bias.detach().numpy().copy(),
        }
        for layer in ("dense1", "head")
    }
    batches = [
        {"image": torch.from_numpy(image).movedim(-1, -3), "label": torch.from_numpy(label)}
        for image, label in zip(images, labels)
    ]
    counterpart = importlib.import_module(f"third_party.torch_counterparts.domain_generalization_{name}")
    update = counterpart.make_update(CONFIG, module, batches[0], **keys)
    expected = [float(update(batch)) for batch in batches]

    builder = resolve("method", f"domain_generalization.{name}")
    method = builder(mlp(num_classes, hidden=(8,)), optax.adam(0.01), **keys)
    ours = [{"image": image, "label": np.int32(label)} for image, label in zip(images, labels)]
    state = method.init(jax.random.key(0), ours[0])._replace(variables={"params": params})
    compiled, losses = jax.jit(method.update), []
    for batch in ours:
        state, metrics = compiled(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_batches_of_environments_have_the_layout_of_ours(tmp_path):
    pytest.importorskip("torch")
    from third_party.torch_counterparts.data import make_sample

    rng = np.random.default_rng(0)
    columns = {"image": rng.integers(0, 256, (40, 28, 28, 1), np.uint8), "label": np.arange(40) % 10}
    np.savez(tmp_path / "digits.npz", **columns)
    sampled = dict(name="streams.sampled", dataset=str(tmp_path / "digits.npz"))
    batch = make_sample(
        dict(name="streams.environments", streams=[sampled] * 3), batch_size=5, device="cpu"
    )()
    assert batch["image"].shape == (3, 5, 1, 28, 28)
    assert batch["label"].shape == (3, 5)

    full = dict(name="domain_generalization.colored_mnist.full_batch", dataset=str(tmp_path / "digits.npz"))
    sample = make_sample(full, batch_size=40, device="cpu")
    batch = sample()
    assert batch["image"].shape == (2, 20, 2, 14, 14)
    assert set(batch["label"].unique().tolist()) == {0, 1}
    used = batch["image"].sum((-1, -2)) > 0
    assert (used.sum(-1) == 1).all()  # one of the two channels
    gray = full | dict(transforms=[dict(name="domain_generalization.colored_mnist.without_color")])
    assert make_sample(gray, batch_size=40, device="cpu")()["image"].shape == (2, 20, 1, 14, 14)
