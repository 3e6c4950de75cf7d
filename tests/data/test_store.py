import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from jaxlab.core import UserError
from jaxlab.data import raw, store


def raw_dataset(count=20, sizes=((4, 4),), classes=3):
    """Images whose every pixel is the example's number."""

    def examples():
        for i in range(count):
            image = Image.new("L", sizes[i % len(sizes)], i)
            yield i, {"image": image, "label": i % classes, "id": f"example_{i}"}

    shape = (*sizes[0], 1) if len(sizes) == 1 else (None, None, 1)
    names = {"label": [f"class {i}" for i in range(classes)]}
    return raw.RawDataset(shape, names, {"train": raw.Split(count, examples())})


def test_digits_are_scikit_learns_each_once(data_dir):
    images, labels = load_digits(return_X_y=True)
    seen = []
    for split, size in (("train", 1200), ("test", 597)):
        source = store.open_source("digits", split, data_dir)
        columns = store.arrays("digits", split, data_dir)
        assert columns["image"].shape == (size, 8, 8, 1)
        assert (columns["image"].dtype, columns["label"].dtype) == (np.uint8, np.int32)
        rows = [int(source[i]["id"].removeprefix(b"digits_")) for i in range(size)]
        np.testing.assert_array_equal(columns["image"].reshape(size, 64), images[rows])
        np.testing.assert_array_equal(columns["label"], labels[rows])
        seen += rows
    assert sorted(seen) == list(range(1797))


def test_tensorflow_is_never_imported(tmp_path):
    program = f"""
        import sys
        from jaxlab.data import store, streams
        import jax
        store.arrays("digits", "test", {str(tmp_path)!r})
        streams.host("digits", batch_size=4, data_dir={str(tmp_path)!r}).batch(0, jax.random.key(0))
        assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)
        print("read")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "read\n", done.stderr  # nor does TFDS write anything of its own
    assert "OpenCV" not in done.stderr


def test_a_data_set_that_another_process_finished_first_is_taken(tmp_path, data_dir, monkeypatch):
    builder = store.tfds_builder("digits", str(tmp_path))
    generate_split = type(builder)._split_generators

    def meanwhile(self, dl_manager):
        shutil.copytree(os.path.join(data_dir, "digits"), tmp_path / "digits", dirs_exist_ok=True)
        return generate_split(self, dl_manager)

    monkeypatch.setattr(type(builder), "_split_generators", meanwhile)
    store.generate(builder)
    assert len(store.arrays("digits", "all", str(tmp_path))["label"]) == 1797
    assert os.listdir(tmp_path / "digits") == ["1.0.0"]


def test_a_half_written_data_set_is_not_read(tmp_path):
    dataset = raw_dataset()

    def killed():
        yield from list(dataset.splits["train"].examples)[:5]
        raise KeyboardInterrupt

    broken = dataset._replace(splits={"train": raw.Split(20, killed())})
    with pytest.raises(KeyboardInterrupt):
        store.generate(store.raw_builder("numbers", broken, str(tmp_path)))
    with pytest.raises(UserError, match="not in"):
        store.open_source("numbers", "train", str(tmp_path))
    store.generate(store.raw_builder("numbers", raw_dataset(), str(tmp_path)))
    assert len(store.open_source("numbers", "train", str(tmp_path))) == 20


def test_raw_data_come_back_as_columns_and_split_strings_work(tmp_path):
    store.generate(store.raw_builder("numbers", raw_dataset(), str(tmp_path)))
    columns = store.arrays("numbers", "train", str(tmp_path))
    assert set(columns) == {"image", "label"}
    order = columns["image"][:, 0, 0, 0]
    assert sorted(order) == list(range(20))
    np.testing.assert_array_equal(
        columns["image"], np.broadcast_to(order[:, None, None, None], (20, 4, 4, 1))
    )
    np.testing.assert_array_equal(columns["label"], order % 3)
    np.testing.assert_array_equal(
        store.arrays("numbers", "train[5:8]", str(tmp_path))["label"], columns["label"][5:8]
    )
    assert store.num_classes("numbers", str(tmp_path)) == 3


def test_a_name_of_tfds_gets_its_version_and_class_names_so_that_tfds_reads_it(tmp_path):
    dataset = raw_dataset(sizes=((28, 28),))
    dataset = dataset._replace(classes={"label": ["0", "1", "2"]})
    store.generate(store.raw_builder("fashion_mnist", dataset, str(tmp_path)))
    source = tfds.data_source("fashion_mnist", split="train", data_dir=str(tmp_path))
    assert len(source) == 20
    assert store.num_classes("fashion_mnist", str(tmp_path)) == 10
    assert store.open_builder("fashion_mnist", str(tmp_path)).info.features["label"].names[1] == "Trouser"
    with pytest.raises(UserError, match="another data set in TFDS"):
        store.raw_builder("cifar10", dataset, str(tmp_path))


@pytest.mark.parametrize("name", ["digits", "", "a/b", "..", "Upper", "a b"])
def test_names_that_cannot_be_are_refused(name, tmp_path):
    with pytest.raises(UserError, match="cannot be the name"):
        store.raw_builder(name, raw_dataset(), str(tmp_path))


def test_missing_data_names_the_folder_and_the_command(tmp_path):
    with pytest.raises(UserError) as error:
        store.arrays("mnist", "train", str(tmp_path))
    assert str(tmp_path / "mnist") in str(error.value)
    assert f"launch.prepare_data mnist --source DIR --data_dir {tmp_path}" in str(error.value)


def test_the_environment_names_the_default_folder(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/somewhere")
    assert store.data_folder() == "/somewhere"
    assert store.data_folder("/else") == "/else"
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert store.data_folder() == os.path.expanduser("~/tensorflow_datasets")


@pytest.mark.parametrize("split", ["tran", "train[", "train[:0]", ""])
def test_a_split_that_is_not_there_names_those_that_are(data_dir, split):
    with pytest.raises(UserError, match=r"train \(1200\), test \(597\)|is empty"):
        store.open_source("digits", split, data_dir)


def test_images_of_several_sizes_are_refused_with_the_mend(tmp_path):
    store.generate(store.raw_builder("numbers", raw_dataset(sizes=((4, 4), (5, 4))), str(tmp_path)))
    with pytest.raises(UserError, match="--size"):
        store.arrays("numbers", "train", str(tmp_path))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("pattern", ["*train.array_record*", "dataset_info.json", "features.json"])
@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_bytes(b"")], ids=["truncated", "empty"])
def test_a_damaged_store_is_one_line_that_names_it(tmp_path, data_dir, pattern, damage):
    shutil.copytree(os.path.join(data_dir, "digits"), tmp_path / "digits")
    damage(next(tmp_path.glob(f"digits/1.0.0/{pattern}")))
    with pytest.raises(UserError) as error:
        store.arrays("digits", "train", str(tmp_path))
    assert f"{tmp_path / 'digits'}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/digits"):
        store.open_source("digits", "train", str(tmp_path / "file"))
