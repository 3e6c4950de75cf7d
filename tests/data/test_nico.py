"""NICO is split by the contexts of DecAug's list, and contexts have one vocabulary over classes and splits."""

import pytest
from PIL import Image

from jaxlab.core import UserError
from jaxlab.data import nico, raw


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5)).save(path)


@pytest.fixture
def animals(tmp_path):
    names = ["dog/on_grass/1.jpg", "dog/on_grass/2.png", "dog/running/1.png", "dog/in street/1.png"]
    names += ["bear/on_tree/1.png", "bear/white/1.png", "bear/on_grass/1.png", "bear/black/1.png"]
    for name in names:
        write_image(tmp_path / "animals" / name)
    return tmp_path / "animals"


def test_contexts_are_held_out_class_by_class_and_numbered_together(animals):
    assert nico.is_nico(animals)
    dataset = nico.nico_folder(animals)
    assert dataset.image_shape == (5, 6, 3)
    contexts = ["black", "in_street", "on_grass", "on_tree", "running", "white"]
    assert dataset.classes == {"label": ["bear", "dog"], "context": contexts}
    found = {
        name: [
            (example["id"], example["label"], contexts[example["context"]]) for _, example in split.examples
        ]
        for name, split in dataset.splits.items()
    }
    assert found == {
        "train": [
            ("bear/black/1.png", 0, "black"),
            ("bear/on_grass/1.png", 0, "on_grass"),
            ("dog/on_grass/1.jpg", 1, "on_grass"),
            ("dog/on_grass/2.png", 1, "on_grass"),
        ],
        "val": [("bear/on_tree/1.png", 0, "on_tree"), ("dog/running/1.png", 1, "running")],
        "test": [("bear/white/1.png", 0, "white"), ("dog/in street/1.png", 1, "in_street")],
    }
    assert nico.nico_folder(animals, size=4).image_shape == (4, 4, 3)


def test_the_list_has_all_classes_each_with_two_contexts():
    assert {half: len(classes) for half, classes in nico.HELD_OUT.items()} == {"animal": 10, "vehicle": 9}
    for classes in nico.HELD_OUT.values():
        assert all(val != test for val, test in classes.values())


def test_other_folders_are_no_nico(animals, tmp_path):
    assert not nico.is_nico(tmp_path)
    assert not nico.is_nico(tmp_path / "absent")
    (animals / "dog" / "running").rename(animals / "dog" / "sleeping")
    assert not nico.is_nico(animals)
    assert raw.find_layout(animals) == "folder"
    (animals / "dog" / "sleeping").rename(animals / "dog" / "running")
    for other in ("car", "photo"):
        write_image(animals / other / "on_track" / "1.png")
        assert not nico.is_nico(animals)
        (animals / other).rename(tmp_path / other)
    assert nico.is_nico(animals)


def one_line(folder):
    with pytest.raises(UserError) as error:
        nico.nico_folder(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_does_not_fit_is_one_line_that_names_it(animals, tmp_path):
    assert "expected a folder for each class: bear, bird" in one_line(tmp_path)
    assert "It has: animals." in one_line(tmp_path)
    (animals / "bear" / "cub").mkdir()
    assert f"{animals / 'bear' / 'cub'}: no images" in one_line(animals)
    (animals / "bear" / "cub").rmdir()
    (animals / "bear" / "on tree").mkdir()
    assert f"{animals / 'bear'}: a context is there with a space and with _" in one_line(animals)
    (animals / "bear" / "on tree").rmdir()
    (animals / "bear" / "white").rename(tmp_path / "white")
    assert f"{animals / 'bear' / 'white'}: no such folder; it is test of bear" in one_line(animals)
    (tmp_path / "white").rename(animals / "bear" / "white")
    (animals / "dog" / "on_grass").rename(tmp_path / "on_grass")
    assert f"{animals / 'dog'}: no contexts to train on besides running and in_street" in one_line(animals)
    write_image(animals / "car" / "on_track" / "1.png")
    assert "It has: bear, car, dog." in one_line(animals)


def test_a_broken_image_is_named(animals):
    path = animals / "dog" / "on_grass" / "1.jpg"
    path.write_bytes(b"")
    assert f"{path}: broken image" in one_line(animals)
