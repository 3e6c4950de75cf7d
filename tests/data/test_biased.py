"""Biased data sets keep label, attribute and order; each damaged file ends in one line that names it."""

import os
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from jaxlab.core import UserError
from jaxlab.data import biased, raw, store


def listed(split, *features):
    """The id and the numbers of each example, in order."""
    return [(example["id"], *(example[name] for name in features)) for _, example in split.examples]


def read_all(function, *arguments):
    return [list(split.examples) for split in function(*arguments).splits.values()]


def one_line(function, *arguments):
    with pytest.raises(UserError) as error:
        read_all(function, *arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- Arrays ---


ATTRS = {"train": np.array([[0, 0], [1, 1], [2, 1], [0, 0]]), "valid": np.array([[1, 3], [2, 0]])}


@pytest.fixture
def array_files(tmp_path):
    """Images of 5 × 4 pixels, all of them the image's number."""
    folder = tmp_path / "arrays"
    for split, attrs in ATTRS.items():
        (folder / split).mkdir(parents=True)
        numbers = np.arange(len(attrs), dtype=np.uint8)
        images = np.broadcast_to(numbers[:, None, None, None], (len(attrs), 5, 4, 3))
        np.save(folder / split / "images.npy", images)
        np.save(folder / split / "attrs.npy", attrs.astype(np.uint8))
    return folder


def test_arrays_keep_their_splits_order_and_both_columns(array_files):
    assert raw.find_layout(array_files) == "arrays"
    dataset = biased.array_folder(array_files)
    assert dataset.image_shape == (5, 4, 3)
    assert dataset.classes == {"label": ["0", "1", "2"], "attribute": ["0", "1", "2", "3"]}
    assert {name: split.count for name, split in dataset.splits.items()} == {"train": 4, "valid": 2}
    for i, (key, example) in enumerate(dataset.splits["train"].examples):
        assert (key, example["id"]) == (i, f"train_0000{i}")
        assert [example["label"], example["attribute"]] == ATTRS["train"][i].tolist()
        np.testing.assert_array_equal(example["image"], np.full((5, 4, 3), i))


def test_images_are_mapped_and_not_loaded(array_files):
    path = array_files / "train" / "images.npy"
    examples = biased.array_folder(array_files).splits["train"].examples
    with open(path, "r+b") as file:  # in place, after the data set was made
        file.seek(-1, os.SEEK_END)
        file.write(b"\xc8")
    assert np.asarray(list(examples)[-1][1]["image"])[-1, -1, -1] == 200


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_names_names_the_values(array_files, protocol):
    (array_files / "attr_names.pkl").write_bytes(pickle.dumps(["digit", "color"], protocol))
    classes = biased.array_folder(array_files).classes
    assert (classes["label"][2], classes["attribute"][3]) == ("digit 2", "color 3")


def test_names_may_stand_in_a_text_file(array_files):
    (array_files / "attr_names.txt").write_text("object\ncorruption\n")
    assert biased.array_folder(array_files).classes["attribute"][0] == "corruption 0"


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(array_files, tmp_path):
    path = array_files / "attr_names.pkl"
    evil = Evil(tmp_path / "ran")
    path.write_bytes(pickle.dumps([evil, "color"]))
    assert f"{path}: refers to" in one_line(biased.array_folder, array_files)
    for name in ("attrs.npy", "images.npy"):
        path = array_files / "train" / name
        np.save(path, np.array([evil]), allow_pickle=True)
        assert f"{path}: not an array" in one_line(biased.array_folder, array_files)
        path.write_bytes(pickle.dumps(evil))
        assert f"{path}: not an array" in one_line(biased.array_folder, array_files)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "names", [["digit"], ["digit", 2], "ab", {"digit": 0, "color": 1}, ["digit", "co\nlor"], 3], ids=str
)
def test_names_that_are_not_two_are_refused(array_files, names):
    path = array_files / "attr_names.pkl"
    path.write_bytes(pickle.dumps(names))
    assert f"{path}: expected two names" in one_line(biased.array_folder, array_files)


IMAGES = np.zeros((4, 5, 4, 3), np.uint8)
WRONG_ARRAYS = {
    "images of floats": ("images", IMAGES / 255, "float64 (4, 5, 4, 3); save images as uint8"),
    "images without channels": (
        "images",
        IMAGES[..., 0],
        "uint8 (4, 5, 4); save images as uint8 (N, H, W, 3)",
    ),
    "grey images": ("images", IMAGES[..., :1], "uint8 (4, 5, 4, 1); save images"),
    "planes of colour": ("images", IMAGES.transpose(0, 3, 1, 2), "(4, 3, 5, 4); save images"),
    "no images": ("images", IMAGES[:0], "train/images.npy"),
    "other size than valid": ("images", IMAGES[:, 1:], "(4, 4, 3) in train, (5, 4, 3) in valid"),
    "fewer rows": ("attrs", ATTRS["train"][:3], "3 rows for 4 images"),
    "three columns": ("attrs", np.zeros((4, 3), np.uint8), "uint8 (4, 3); save label and attribute"),
    "one column": ("attrs", ATTRS["train"][:, 0], "(4,); save label and attribute"),
    "floats": ("attrs", ATTRS["train"] / 1, "float64 (4, 2); save label and attribute"),
    "below zero": ("attrs", ATTRS["train"] - 1, "values from -1 to 1; number labels and attributes from 0"),
    "too many": ("attrs", ATTRS["train"] * 128, "values from 0 to 256; number labels and attributes from 0"),
}


@pytest.mark.parametrize(("name", "array", "message"), WRONG_ARRAYS.values(), ids=WRONG_ARRAYS.keys())
def test_arrays_of_a_wrong_type_shape_or_range_are_one_line_with_the_mend(array_files, name, array, message):
    np.save(array_files / "train" / f"{name}.npy", array)
    error = one_line(biased.array_folder, array_files)
    assert message in error
    assert str(array_files) in error


def npy_claiming(shape):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(240)


DAMAGED_NPY = {
    "empty": b"",
    "text": b"<!DOCTYPE html>",
    "only a magic": b"\x93NUMPY\x01\x00",
    "no header": b"\x93NUMPY\x01\x00\x10\x00" + b"{" * 16,
    "truncated": npy_claiming((4, 5, 4, 3))[:-1],
    "gigabytes claimed": npy_claiming((2**20, 2**10, 2**10, 3)),
    "more than can be counted": npy_claiming((2**62, 2**62, 4, 3)),
    "a negative size": npy_claiming((-4, 5, 4, 3)),
    "a long header": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**20) + b" " * 2**20,
    "an archive": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("content", DAMAGED_NPY.values(), ids=DAMAGED_NPY.keys())
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_damaged_array_is_one_line_that_names_it(array_files, content):
    path = array_files / "train" / "images.npy"
    path.write_bytes(content)
    assert f"{path}: not an array of numbers, or damaged" in one_line(biased.array_folder, array_files)


@pytest.mark.parametrize(
    "missing", ["train/images.npy", "train/attrs.npy", "valid/images.npy", "valid/attrs.npy"]
)
def test_a_missing_array_is_named(array_files, missing):
    (array_files / missing).unlink()
    assert raw.find_layout(array_files) == "arrays"
    assert f"{array_files / missing}: no such file" in one_line(biased.array_folder, array_files)


# --- Folders of aligned and conflicting images ---


def write_image(path, size=(6, 5), color=(1, 2, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def share(tmp_path):
    """One share of a biased data set with all four folders, `valid` flat and `test` by class."""
    folder = tmp_path / "cmnist" / "1pct"
    for name in ("align/1/b_1_1", "align/0/c_0_0", "align/0/a_0_0", "conflict/0/d_0_2", "valid/e_1_0"):
        write_image(folder / f"{name}.png")
    write_image(folder / "test" / "1" / "f_1_1.png")
    return folder


def test_training_examples_are_aligned_then_conflicting_in_order_of_their_paths(share):
    assert raw.find_layout(share) == "biased"
    dataset = biased.biased_folder(share)
    assert dataset.image_shape == (5, 6, 3)
    assert dataset.classes == {"label": ["0", "1"], "attribute": ["0", "1", "2"]}
    assert listed(dataset.splits["train"], "label", "attribute") == [
        ("align/0/a_0_0.png", 0, 0),
        ("align/0/c_0_0.png", 0, 0),
        ("align/1/b_1_1.png", 1, 1),
        ("conflict/0/d_0_2.png", 0, 2),
    ]
    assert listed(dataset.splits["valid"], "label", "attribute") == [("valid/e_1_0.png", 1, 0)]
    assert listed(dataset.splits["test"], "label", "attribute") == [("test/1/f_1_1.png", 1, 1)]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_what_the_shares_have_in_common_lies_one_level_up(share, split, monkeypatch):
    (share / split).rename(share.parent / split)
    assert [i for i, *_ in listed(biased.biased_folder(share).splits[split])] in (
        ["valid/e_1_0.png"],
        ["test/1/f_1_1.png"],
    )
    monkeypatch.chdir(share)
    assert biased.biased_folder(type(share)(".")).splits[split].count == 1


def test_what_lies_beside_goes_before_what_lies_above(share):
    write_image(share.parent / "test" / "0" / "g_0_1.png")
    assert listed(biased.biased_folder(share).splits["test"]) == [("test/1/f_1_1.png",)]


def test_the_folder_of_all_shares_is_refused_with_the_one_to_give(share):
    (share / "test").rename(share.parent / "test")
    message = one_line(raw.find_layout, share.parent)
    assert f"give one, such as {share}" in message


@pytest.mark.parametrize("folder", ["align", "conflict", "valid", "test"])
def test_a_missing_or_empty_folder_is_named(share, folder):
    (share / folder).rename(share / "elsewhere")
    assert str(share / folder) in one_line(biased.biased_folder, share)
    (share / folder).mkdir()
    message = one_line(biased.biased_folder, share)
    assert f"{share / folder}: no images; expected {share / folder}/<class>" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("align/0/image.png", "does not end in _<label>_<attribute>"),
        ("align/0/image_0.png", "does not end in _<label>_<attribute>"),
        ("align/0/image0_0.png", "does not end in _<label>_<attribute>"),
        ("align/0/image_0_-1.png", "does not end in _<label>_<attribute>"),
        ("align/0/image_0_²۰.png", "does not end in _<label>_<attribute>"),
        ("align/0/image_0_256.png", "number them from 0 to at most 255"),
        (f"valid/1_{'9' * 200}_0.png", "number them from 0 to at most 255"),
        ("conflict/1/image_0_1.png", "label 0 by its name, 1 by its folder"),
    ],
)
def test_a_file_whose_name_does_not_tell_is_named(share, name, message):
    write_image(share / name)
    error = one_line(biased.biased_folder, share)
    assert error.startswith(f"{share / name}: ")
    assert message in error


def test_classes_may_have_names_and_a_files_name_only_the_two_fields(share):
    (share / "conflict" / "0").rename(share / "conflict" / "zero")
    write_image(share / "valid" / "0_1.png")
    dataset = biased.biased_folder(share)
    assert listed(dataset.splits["valid"], "label", "attribute")[0] == ("valid/0_1.png", 0, 1)
    assert listed(dataset.splits["train"], "label")[-1] == ("conflict/zero/d_0_2.png", 0)


# --- The class in the file's name ---


@pytest.fixture
def bar_files(tmp_path):
    folder = tmp_path / "BAR"
    for name in ("train/climbing_10.jpg", "train/climbing_9.jpg", "train/pole vaulting_0.jpg"):
        write_image(folder / name)
    write_image(folder / "test" / "diving_520.jpg", size=(9, 9))
    (folder / "assets").mkdir()
    (folder / "metadata.json").write_text("{}")
    return folder


def test_bar_has_its_classes_in_the_names_and_no_attribute(bar_files):
    assert raw.find_layout(bar_files) == "flat"
    dataset = biased.flat_folder(bar_files)
    assert dataset.image_shape == (None, None, 3)
    assert dataset.classes == {"label": ["climbing", "diving", "pole vaulting"]}
    assert listed(dataset.splits["train"], "label") == [
        ("train/climbing_10.jpg", 0),
        ("train/climbing_9.jpg", 0),
        ("train/pole vaulting_0.jpg", 2),
    ]
    assert listed(dataset.splits["test"], "label") == [("test/diving_520.jpg", 1)]
    assert biased.flat_folder(bar_files, size=4).image_shape == (4, 4, 3)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_of_bar_is_named(bar_files, split):
    (bar_files / split).rename(bar_files / "elsewhere")
    message = one_line(biased.flat_folder, bar_files)
    assert f"{bar_files / split}: no images; expected {bar_files / split}/<class>_<number>.png" in message


@pytest.mark.parametrize("name", ["climbing.jpg", "_1.jpg"])
def test_a_file_without_a_class_is_named(bar_files, name):
    write_image(bar_files / "test" / name)
    assert f"{bar_files / 'test' / name}: its name is not" in one_line(biased.flat_folder, bar_files)


# --- All of them ---


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("damage", [b"", b"<svg/>", None], ids=["empty", "text", "truncated"])
def test_a_broken_image_is_one_line_that_names_it(share, bar_files, size, damage):
    for read, folder, name in (
        (biased.biased_folder, share, "conflict/0/d_0_2.png"),
        (biased.flat_folder, bar_files, "test/diving_520.jpg"),
    ):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage is None else damage)
        assert f"{path}: broken image" in one_line(read, folder, size)


def test_folders_with_none_of_the_layouts_are_refused_in_one_line_with_all_of_them(tmp_path):
    (tmp_path / "photo" / "cat").mkdir(parents=True)
    (tmp_path / "photo" / "cat" / "notes.txt").write_text("no image")
    message = one_line(raw.find_layout, tmp_path)
    for layout in ("IDX", "CIFAR", "arrays", "biased", "flat", "folder"):
        assert f"({layout}" in message


def test_a_stored_data_set_has_the_attribute_as_a_column_and_the_same_order_each_time(tmp_path, array_files):
    orders = []
    for data_dir in (str(tmp_path / "first"), str(tmp_path / "second")):
        store.generate(store.raw_builder("colors", biased.array_folder(array_files), data_dir))
        columns = store.arrays("colors", "train", data_dir)
        assert set(columns) == {"image", "label", "attribute"}
        assert (columns["label"].dtype, columns["attribute"].dtype) == (np.int32, np.int32)
        orders.append(columns["image"][:, 0, 0, 0])
        pairs = np.stack([columns["label"], columns["attribute"]], axis=1)
        np.testing.assert_array_equal(pairs, ATTRS["train"][orders[-1]])
        assert store.num_classes("colors", data_dir, feature="attribute") == 4
    np.testing.assert_array_equal(*orders)
    assert sorted(orders[0]) == [0, 1, 2, 3]
