"""Damaged and hostile files: each ends in one line that names the file, and none is believed."""

import gzip
import os
import pickle
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxlab.core import UserError
from jaxlab.data import raw

PIXELS = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def idx_bytes(array, shape=None, type_code=0x08):
    shape = array.shape if shape is None else shape
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, type_code, len(shape), *shape) + array.tobytes()


def cifar_batch(count=3, **changes):
    data = np.random.default_rng(0).integers(0, 256, (count, 3072), dtype=np.uint8)
    return {b"data": data, b"labels": list(range(count))} | {k.encode(): v for k, v in changes.items()}


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("encode", [bytes, gzip.compress], ids=["plain", "gzipped"])
@pytest.mark.parametrize("array", [PIXELS, np.arange(5, dtype=np.uint8)], ids=["images", "labels"])
def test_idx_files_read_back(tmp_path, encode, array):
    path = tmp_path / "file"
    path.write_bytes(encode(idx_bytes(array)))
    np.testing.assert_array_equal(raw.read_idx(path), array)


GOOD = idx_bytes(PIXELS)
DAMAGED_IDX = {
    "empty": b"",
    "wrong magic": b"\1\2\3\4" + GOOD[4:],
    "wrong element type": idx_bytes(PIXELS, type_code=0x0D),
    "no dimensions": b"\0\0\x08\0",
    "too many dimensions": b"\0\0\x08\xff" + bytes(2000),
    "only a magic number": GOOD[:4],
    "truncated header": GOOD[:9],
    "truncated data": GOOD[:-1],
    "more data than said": GOOD + b"\0",
    "an empty dimension": idx_bytes(PIXELS[:0]),
    "gigabytes claimed": idx_bytes(PIXELS, shape=(2**32 - 1, 2**32 - 1, 2**32 - 1)),
    "a gigabyte claimed": idx_bytes(PIXELS, shape=(2**10, 2**10, 2**10)),
    "a gigabyte claimed, gzipped": gzip.compress(idx_bytes(PIXELS, shape=(2**10, 2**10, 2**10))),
    "a bomb": gzip.compress(GOOD + bytes(2**26)),
    "truncated gzip": gzip.compress(GOOD)[:-10],
    "gzip header only": b"\x1f\x8b",
    "gzip with a wrong checksum": gzip.compress(GOOD)[:-8] + bytes(8),
    "broken deflate stream": gzip.compress(GOOD)[:12] + b"\xff" * 30,
    "text": b"<!DOCTYPE html>",
}


@pytest.mark.parametrize("content", DAMAGED_IDX.values(), ids=DAMAGED_IDX.keys())
def test_a_damaged_idx_file_is_one_line_that_names_it_and_allocates_nothing(tmp_path, content):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError) as error:
        raw.read_idx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert peak < 2**23


def test_a_missing_idx_file_is_named(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(GOOD)
    with pytest.raises(UserError, match="train-labels-idx1-ubyte"):
        raw.idx_folder(tmp_path)


def write_idx_folder(folder, labels=(0, 1), suffix="", dot="-"):
    encode = gzip.compress if suffix else bytes
    for prefix in ("train", "t10k"):
        (folder / f"{prefix}-images{dot}idx3-ubyte{suffix}").write_bytes(encode(idx_bytes(PIXELS)))
        content = encode(idx_bytes(np.array(labels, np.uint8)))
        (folder / f"{prefix}-labels{dot}idx1-ubyte{suffix}").write_bytes(content)


@pytest.mark.parametrize(("suffix", "dot"), [("", "-"), (".gz", "-"), (".gz", ".")])
def test_an_idx_folder_holds_images_with_their_labels(tmp_path, suffix, dot):
    write_idx_folder(tmp_path, suffix=suffix, dot=dot)
    assert raw.find_layout(tmp_path) == "idx"
    dataset = raw.idx_folder(tmp_path)
    assert dataset.image_shape == (3, 4, 1)
    assert dataset.classes == {"label": ["0", "1"]}
    key, example = list(dataset.splits["test"].examples)[1]
    assert (key, example["label"], example["id"]) == (1, 1, "test_00001")
    np.testing.assert_array_equal(example["image"], PIXELS[1])


def test_labels_that_do_not_match_the_images_are_refused(tmp_path):
    write_idx_folder(tmp_path, labels=(0, 1, 2))
    with pytest.raises(UserError, match="3 labels for 2 images"):
        raw.idx_folder(tmp_path)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_cifar_batch_reads_back_without_unpickling_arrays(tmp_path, protocol):
    batch = cifar_batch()
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(batch, protocol=protocol))
    images, labels = raw.read_cifar(path, {"label": "labels"})
    assert images.shape == (3, 32, 32, 3)
    np.testing.assert_array_equal(images[1, 2, 3], batch[b"data"][1].reshape(3, 32, 32)[:, 2, 3])
    np.testing.assert_array_equal(labels["label"], [0, 1, 2])


def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path):
    for i, content in enumerate(
        (
            pickle.dumps(cifar_batch() | {b"evil": Evil(tmp_path / "ran")}),
            b"cos\nsystem\n(S'mkdir " + str(tmp_path / "ran").encode() + b"'\ntR.",
            b"cbuiltins\neval\n(S'1'\ntR.",
        )
    ):
        path = tmp_path / f"evil_{i}"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path}: refers to .* refused"):
            raw.read_cifar(path, {"label": "labels"})
    assert not (tmp_path / "ran").exists()


CIFAR = pickle.dumps(cifar_batch(), protocol=2)
DAMAGED_CIFAR = {
    "empty": b"",
    "truncated": CIFAR[: len(CIFAR) // 2],
    "not a pickle": b"\x89PNG\r\n",
    "not a dict": pickle.dumps([1, 2]),
    "no data": pickle.dumps({b"labels": [0]}),
    "data is no array": pickle.dumps(cifar_batch(data="0123")),
    "wrong width": pickle.dumps(cifar_batch(data=np.zeros((3, 3071), np.uint8))),
    "wrong element type": pickle.dumps(cifar_batch(data=np.zeros((3, 3072), np.float32))),
    "objects": pickle.dumps(cifar_batch(data=np.array([[{}] * 3072] * 3))),
    "too few labels": pickle.dumps(cifar_batch(labels=[0])),
    "labels are text": pickle.dumps(cifar_batch(labels=["a", "b", "c"])),
    "no examples": pickle.dumps(cifar_batch(count=0)),
    "lying shape": CIFAR.replace(b"M\x00\x0c", b"J\xff\xff\xff\x7f", 1),
    "bytes of a gigabyte": b"\x80\x04\x8e" + struct.pack("<Q", 2**30) + b"x.",
    "bytearray of a gigabyte": b"\x80\x05\x96" + struct.pack("<Q", 2**30) + b"x.",
    "memo index of a gigabyte": b"\x80\x02}r" + struct.pack("<I", 2**30) + b".",
}


@pytest.mark.parametrize("content", DAMAGED_CIFAR.values(), ids=DAMAGED_CIFAR.keys())
def test_a_damaged_cifar_file_is_one_line_that_names_it_and_allocates_nothing(tmp_path, content):
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError) as error:
        raw.read_cifar(path, {"label": "labels"})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert peak < 2**23


def write_cifar10(folder, names=10):
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps(cifar_batch(), protocol=2))
    meta = {b"label_names": [f"class {i}".encode() for i in range(names)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))


def test_a_cifar10_folder_holds_five_batches_in_order(tmp_path):
    write_cifar10(tmp_path)
    assert raw.find_layout(tmp_path) == "cifar"
    dataset = raw.cifar_folder(tmp_path)
    assert {name: split.count for name, split in dataset.splits.items()} == {"train": 15, "test": 3}
    assert [example["label"] for _, example in dataset.splits["train"].examples] == [0, 1, 2] * 5
    assert dataset.classes["label"][9] == "class 9"


def test_a_cifar100_folder_has_both_labels(tmp_path):
    batch = {b"fine_labels": [99, 1, 2], b"coarse_labels": [19, 0, 0], b"data": cifar_batch()[b"data"]}
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {
        b"fine_label_names": [b"f%d" % i for i in range(100)],
        b"coarse_label_names": [b"c%d" % i for i in range(20)],
    }
    (tmp_path / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    _, example = next(iter(raw.cifar_folder(tmp_path).splits["train"].examples))
    assert (example["label"], example["coarse_label"]) == (99, 19)


def test_a_missing_cifar_batch_a_wrong_label_and_wrong_names_are_named(tmp_path):
    write_cifar10(tmp_path, names=9)
    with pytest.raises(UserError, match=r"batches\.meta"):
        raw.cifar_folder(tmp_path)
    (tmp_path / "test_batch").write_bytes(pickle.dumps(cifar_batch(labels=[0, 1, 10])))
    with pytest.raises(UserError, match=r"test_batch: a label is outside 0\.\.9"):
        raw.cifar_folder(tmp_path)
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(UserError, match="data_batch_3: no such file"):
        raw.cifar_folder(tmp_path)


def write_images(folder, domains=("photo", "sketch"), size=(6, 5)):
    for domain in domains:
        for i, name in enumerate(("cat", "dog")):
            (folder / domain / name).mkdir(parents=True)
            color = (10 * i, 20, 30)
            Image.new("RGB", size, color).save(folder / domain / name / "1.png")


def test_an_image_folder_has_a_split_for_each_domain(tmp_path):
    write_images(tmp_path)
    Image.new("L", (6, 5), 7).save(tmp_path / "photo" / "dog" / "2.JPG", "JPEG")
    (tmp_path / "photo" / "dog" / "notes.txt").write_text("not an image")
    assert raw.find_layout(tmp_path) == "folder"
    dataset = raw.image_folder(tmp_path)
    assert dataset.image_shape == (5, 6, 3)
    assert dataset.classes == {"label": ["cat", "dog"], "domain": ["photo", "sketch"]}
    assert {name: split.count for name, split in dataset.splits.items()} == {"photo": 3, "sketch": 2}
    key, example = list(dataset.splits["photo"].examples)[-1]
    assert (key, example["label"], example["domain"]) == ("photo/dog/2.JPG", 1, 0)
    assert example["image"].mode == "RGB"


def test_a_domain_whose_name_has_a_space_is_a_split_with_an_underscore(tmp_path):
    write_images(tmp_path)
    (tmp_path / "photo").rename(tmp_path / "real photo")
    assert raw.image_folder(tmp_path).classes["domain"] == ["real_photo", "sketch"]
    (tmp_path / "sketch").rename(tmp_path / "real_photo")
    with pytest.raises(UserError, match="another folder has this name"):
        raw.image_folder(tmp_path)


def test_images_of_several_sizes_have_no_fixed_shape_until_resized(tmp_path):
    write_images(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "photo" / "cat" / "2.png")
    assert raw.image_folder(tmp_path).image_shape == (None, None, 3)
    resized = raw.image_folder(tmp_path, size=4)
    assert resized.image_shape == (4, 4, 3)
    assert {example["image"].size for _, example in resized.splits["photo"].examples} == {(4, 4)}


def png_claiming(width, height, content):
    header = struct.pack(">II", width, height)
    chunk = b"IHDR" + header + content[24:29]
    return content[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "lying size", "gigapixels", "flipped"])
def test_a_broken_image_is_one_line_that_names_it(tmp_path, damage):
    write_images(tmp_path, size=(40, 40))
    path = tmp_path / "sketch" / "dog" / "1.png"
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[:-30],
            "empty": b"",
            "text": b"<svg/>",
            "lying size": png_claiming(5000, 5000, content),
            "gigapixels": png_claiming(10**5, 10**5, content),
            "flipped": content[:50] + bytes(10) + content[60:],
        }[damage]
    )
    with pytest.raises(UserError) as error:
        list(raw.image_folder(tmp_path).splits["sketch"].examples)
    assert f"{path}: broken image" in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_that_are_laid_out_otherwise_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        raw.find_layout(tmp_path / "absent")
    with pytest.raises(UserError, match="expected"):
        raw.find_layout(tmp_path)
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "cat" / "1.png")
    with pytest.raises(UserError, match="<class>"):
        raw.image_folder(tmp_path)
    write_images(tmp_path / "other", domains=("my-photos",))
    with pytest.raises(UserError, match="name of a split"):
        raw.image_folder(tmp_path / "other")
