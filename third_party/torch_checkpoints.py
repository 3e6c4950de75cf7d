"""Reads PyTorch's checkpoint files without PyTorch, and without running anything that is in them.

A checkpoint, as `torch.save` has written it since PyTorch 1.6, is a zip archive: `data.pkl`, a pickle in
which tensors are references, and `data/0`, `data/1` and so on, the bytes they refer to. The pickle can build
nothing here but plain values and records of tensors, and a tensor is a view of bytes that are there.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxlab.core import UserError

_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class _Tensor(NamedTuple):
    """A tensor as the pickle describes it."""

    dtype: np.dtype
    storage: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor(storage: tuple, offset: int, size: tuple, stride: tuple, *_: Any) -> _Tensor:
    _, dtype, name, *_ = storage  # "storage", dtype, name, device, number of elements
    return _Tensor(dtype, name, offset, size, stride)


class _Unpickler(pickle._Unpickler):
    """Loads plain values and records of tensors.

    It is Python's own Unpickler and not the one in C, which reserves the memory that a length or a memo
    index claims before it looks whether the file goes on that far.
    """

    # The one operation that does so here as well; PyTorch's pickles are too old to have it.
    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: None}

    def find_class(self, module: str, name: str) -> Callable[..., Any] | np.dtype:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise UserError(f"refers to {f'{module}.{name}'!r}, which is no plain value or tensor: refused")

    def persistent_load(self, reference: tuple) -> tuple:
        return reference


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a model from a file of `torch.save(model.state_dict(), path)`.

    A training checkpoint {"model_state_dict": ..., ...} will do too; the rest of it is not looked at.

    Returns:
      Arrays by name, not to be written to.

    Raises:
      UserError: the file is missing, damaged, no state dict, or refers to anything but values and tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        # From memory, where a read is as long as what is there; from a file, as long as the archive claims.
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            return _read_archive(archive)
    except UserError as error:
        raise UserError(f"{path}: {error}.") from error
    except Exception as error:  # a damaged file can fail anywhere
        raise UserError(
            f"{path}: damaged, or not written by PyTorch 1.6 or later ({error!r}); fetch it again."
        ) from error


def _read_archive(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise UserError("has compressed parts, which PyTorch does not write: refused")
    folder = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
    content = _Unpickler(io.BytesIO(archive.read(f"{folder}data.pkl"))).load()
    tensors = content.get("model_state_dict", content)
    if not all(isinstance(value, _Tensor) for value in tensors.values()):
        raise UserError("holds no state dict: not all of its values are tensors")

    def read(tensor: _Tensor) -> np.ndarray:
        data = archive.read(f"{folder}data/{tensor.storage}")
        item = tensor.dtype.itemsize
        strides = [item * step for step in tensor.stride]
        # A view, which NumPy makes only where all of it is inside the data.
        return np.ndarray(tensor.size, tensor.dtype, data, item * tensor.offset, strides)

    return {name: read(tensor) for name, tensor in tensors.items()}
