"""Whatever a file or an override holds, it is read or refused in one line, in bounded memory and time."""

import gzip
import io
import pickle
import tracemalloc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxlab import config as configs
from jaxlab import experiment
from jaxlab.core import UserError
from jaxlab.data import raw
from jaxlab.data.biased import array_folder
from launch import cli
from tests.launch import runs
from third_party.torch_checkpoints import read_state_dict

RNG = np.random.default_rng(0)
MOST_MEMORY = 100 << 20  # bytes; the files have a few thousand at most, and claim gigabytes

# The same cases at every run; `make test-all` has many more of them.
EXAMPLES = pytest.mark.parametrize("examples", [50, pytest.param(3000, marks=pytest.mark.slow)])


def fuzz(examples: int, strategy: st.SearchStrategy, check: Callable[[Any], None]) -> None:
    limits = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=timedelta(seconds=10),
        suppress_health_check=list(HealthCheck),
    )
    limits(given(strategy)(check))()


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """The content with up to four edits: bits flipped, sizes that lie, pieces cut out, repeated or put in."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        end = min(len(content), start + draw(st.integers(1, 40)))
        before, piece, after = content[:start], content[start:end], content[end:]
        edit = draw(st.sampled_from(["flip", "size", "cut", "truncate", "repeat", "insert"]))
        if edit == "flip" and piece:
            piece = bytes([piece[0] ^ 1 << draw(st.integers(0, 7))]) + piece[1:]
        elif edit == "size":
            size = draw(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]))
            order = draw(st.sampled_from(["big", "little"]))
            piece = (size % 2**32).to_bytes(4, order) if size < 2**32 else size.to_bytes(8, order)
            after = content[start + len(piece) :]
        elif edit == "cut":
            piece = b""
        elif edit == "truncate":
            piece = after = b""
        elif edit == "repeat":
            piece = piece * draw(st.integers(2, 50))
        elif edit == "insert":
            piece = draw(st.binary(max_size=40)) + piece
        content = before + piece + after
    return content


def _idx() -> bytes:
    return bytes([0, 0, 8, 3, 0, 0, 0, 5, 0, 0, 0, 6, 0, 0, 0, 7]) + RNG.bytes(210)


def _cifar() -> bytes:
    content = {b"data": RNG.integers(0, 256, (2, 3072), np.uint8), b"labels": [3, 9]}
    return pickle.dumps(content, protocol=2)


def _state_dict() -> bytes:
    torch = pytest.importorskip("torch")
    stream = io.BytesIO()
    torch.save(torch.nn.Linear(3, 2).state_dict(), stream)
    return stream.getvalue()


def _images(layout: str) -> Callable[[], bytes]:
    def encode() -> bytes:
        stream = io.BytesIO()
        Image.fromarray(RNG.integers(0, 256, (9, 8, 3), np.uint8)).save(stream, layout)
        return stream.getvalue()

    return encode


def _npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, RNG.integers(0, 256, (2, 8, 8, 3), np.uint8))
    return stream.getvalue()


def _read_images(path: Path) -> None:
    for key, example in raw.image_folder(path.parents[2]).splits["train"].examples:
        assert key
        assert isinstance(example["image"], bytes | Image.Image)


def _read_arrays(path: Path) -> None:
    source = path.parents[1]
    for split in ("train", "valid"):
        (source / split).mkdir(exist_ok=True)
        np.save(source / split / "attrs.npy", np.array([[0, 1], [1, 0]]))
    np.save(source / "valid" / "images.npy", np.zeros((2, 8, 8, 3), np.uint8))
    for split in array_folder(source).splits.values():
        assert split.count == sum(1 for _ in split.examples)


# What is written where, and how it is read.
FORMATS = {
    "idx": (_idx, "images-idx3-ubyte", raw.read_idx),
    "idx_gz": (lambda: gzip.compress(_idx(), mtime=0), "images-idx3-ubyte.gz", raw.read_idx),
    "cifar": (_cifar, "data_batch_1", lambda path: raw.read_cifar(path, {"label": "labels"})),
    "state_dict": (_state_dict, "model.pt", read_state_dict),
    "png": (_images("PNG"), "folder/train/cat/1.png", _read_images),
    "npy": (_npy, "arrays/train/images.npy", _read_arrays),
    "jpeg": (_images("JPEG"), "folder/train/cat/1.jpg", _read_images),
}


@EXAMPLES
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_or_refused_by_name_in_little_memory(name, examples, tmp_path):
    make, place, read = FORMATS[name]
    content, path = make(), tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    read(path)  # undamaged
    refused = []

    def check(content: bytes) -> None:
        path.write_bytes(content)
        tracemalloc.start()
        try:
            read(path)
        except UserError as error:
            refused.append(str(error))
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < MOST_MEMORY

    fuzz(examples, damaged(content), check)
    assert len(refused) > examples / 10
    for message in refused:
        assert path.name in message or str(path.parents[1]) in message
        assert len(message.splitlines()) == 1


KEYS = st.one_of(
    st.sampled_from(
        [
            *(
                "seed",
                "seeds",
                "steps",
                "batch_size",
                "log_every",
                "eval_every",
                "checkpoint_every",
                "devices",
            ),
            *(
                "devices.data",
                "devices.seed",
                "steps_per_call",
                "backend",
                "data_dir",
                "best_metric",
                "init_from",
            ),
            *("data.name", "network.name", "network.hidden", "network.norm", "network.num_classes", "method"),
            *("method.name", "optimizer.name", "optimizer.learning_rate", "evaluators.test.name", "stages"),
        ]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="="), max_size=12),
)
VALUES = st.one_of(
    st.integers().map(str),
    st.integers(min_value=-(10**40), max_value=10**40).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", "None", "True", "[]", "[1,[2]]", "{}", "{'name': 'mlp'}", "9" * 5000, "(" * 300, "nan"]
    ),
    st.text(max_size=20),
)


@EXAMPLES
def test_any_override_is_taken_or_refused_in_one_line(examples, tmp_path):
    config = runs.write_config(tmp_path)
    taken, refused = [], []

    def check(overrides: dict[str, str]) -> None:
        arguments = [f"--config.{key}={value}" for key, value in overrides.items()]
        try:
            configs.settings_of(experiment.load_config(str(config), cli.overrides(arguments)))
        except UserError as error:
            refused.append(str(error))
        else:
            taken.append(overrides)

    fuzz(examples, st.dictionaries(KEYS, VALUES, min_size=1, max_size=2), check)
    assert taken
    assert refused
    assert all(message.strip() for message in refused)
