"""Checkpoints are read as PyTorch reads them, and nothing in them is run."""

import os
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError
from third_party.torch_checkpoints import read_state_dict


def write(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return path


def test_tensors_of_every_type_and_layout_are_read_as_they_were(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "transposed": base.T,
        "view": base[1:3, ::2],
        "scalar": torch.tensor(-1e4),
        "empty": torch.zeros(0, 3),
        "long": torch.arange(5),
        "byte": torch.ones(2, 2, dtype=torch.uint8).tril(),
        "bool": torch.tensor([True, False]),
        "half": torch.tensor([0.5], dtype=torch.float16),
        "bfloat16": torch.tensor([1.5, -2], dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.tensor([3.0])),
    }
    torch.save(tensors, tmp_path / "model.pt")
    arrays = read_state_dict(tmp_path / "model.pt")
    assert list(arrays) == list(tensors)
    assert arrays["bfloat16"].dtype == jnp.bfloat16
    for name, tensor in tensors.items():
        expected = tensor.detach()
        if name == "bfloat16":
            expected, arrays[name] = expected.float(), arrays[name].astype(np.float32)
        np.testing.assert_array_equal(arrays[name], expected.numpy(), strict=True)


def test_the_model_is_found_in_a_training_checkpoint(tmp_path):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    state = {
        "model_state_dict": module.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "train_step": 7,
    }
    torch.save(state, tmp_path / "state.pt")
    arrays = read_state_dict(str(tmp_path / "state.pt"))
    assert list(arrays) == list(module.state_dict())
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(arrays[name], tensor.numpy())


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    class Exploit:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = write(tmp_path / "model.pt", pickle.dumps({"weight": Exploit()}, protocol=2))
    with pytest.raises(UserError, match=r"model\.pt: refers to '\w+\.mkdir'"):
        read_state_dict(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no pickle", "damaged"),
        (pickle.dumps({"weight": 3}, protocol=2), "holds no state dict"),
        (pickle.dumps([1, 2], protocol=2), "damaged"),
        (pickle.PROTO + b"\x05" + pickle.BYTEARRAY8 + b"\xff" * 7 + b"\x7f", "damaged"),
    ],
)
def test_other_contents_are_told(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_state_dict(write(tmp_path / "model.pt", content))


@pytest.mark.parametrize(
    ("keep", "compression", "message"),
    [(8, zipfile.ZIP_STORED, "damaged"), (16, zipfile.ZIP_DEFLATED, "compressed parts")],
)
def test_a_tensor_larger_than_its_data_and_compressed_data_are_refused(tmp_path, keep, compression, message):
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.arange(4.0)}, tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "model.pt", "w", compression) as model,
    ):
        for name in whole.namelist():
            data = whole.read(name)
            model.writestr(name, data[:keep] if name.endswith("data/0") else data)
    with pytest.raises(UserError, match=f"model.pt: .*{message}"):
        read_state_dict(tmp_path / "model.pt")


def test_a_missing_file_and_one_that_is_no_archive_are_told(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_state_dict(tmp_path / "model.pt")
    (tmp_path / "model.pt").write_bytes(b"\x80\x02 a pickle of PyTorch 1.5")
    with pytest.raises(UserError, match=r"PyTorch 1\.6"):
        read_state_dict(tmp_path / "model.pt")
