import gzip
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxlab.core import UserError
from jaxlab.data import store
from launch import prepare_data


def write_idx(path, array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def mnist_files(tmp_path):
    """A folder as MNIST comes, with 30 training images and 10 of test; pixels are the image's number."""
    folder = tmp_path / "files"
    folder.mkdir()
    for prefix, count in (("train", 30), ("t10k", 10)):
        numbers = np.arange(count, dtype=np.uint8)
        images = np.broadcast_to(numbers[:, None, None], (count, 28, 28))
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", numbers % 10)
    return folder


def test_idx_files_become_mnist_and_doing_it_again_says_so(tmp_path, mnist_files, capsys):
    data_dir = tmp_path / "store"
    arguments = ["mnist", "--source", str(mnist_files), "--data_dir", str(data_dir)]
    assert prepare_data.main(arguments) == 0
    out = capsys.readouterr().out
    assert f"Wrote: {data_dir}/mnist/3.0.1 (train 30, test 10)" in out
    columns = store.arrays("mnist", "train", str(data_dir))
    assert columns["image"].shape == (30, 28, 28, 1)
    np.testing.assert_array_equal(columns["image"][:, 0, 0, 0] % 10, columns["label"])
    assert prepare_data.main(arguments) == 0
    assert "Already there" in capsys.readouterr().out


def test_image_folders_become_splits_that_can_be_loaded_by_domain(tmp_path):
    for i, domain in enumerate(("photo", "sketch")):
        for name in ("cat", "dog"):
            folder = tmp_path / "files" / domain / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8 + i, 8), (100 * i, 0, 0)).save(folder / "1.png")
    store_dir = str(tmp_path / "store")
    prepare_data.main(["pets", "--source", str(tmp_path / "files"), "--data_dir", store_dir, "--size", "4"])
    sketch = store.arrays("pets", "sketch", store_dir)
    assert sketch["image"].shape == (2, 4, 4, 3)
    assert set(sketch["image"][..., 0].ravel()) == {100}
    assert set(sketch["domain"]) == {1}
    assert sorted(store.arrays("pets", "photo+sketch", store_dir)["domain"]) == [0, 0, 1, 1]
    assert len(store.arrays("pets", "all", store_dir)["label"]) == 4


def test_a_broken_image_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "files" / "photo" / "cat"
    folder.mkdir(parents=True)
    Image.effect_noise((40, 40), 50).convert("RGB").save(folder / "1.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:-100])
    arguments = ["pets", "--source", str(tmp_path / "files"), "--data_dir", str(tmp_path / "store")]
    with pytest.raises(UserError, match=r"1\.png: broken image"):
        prepare_data.main(arguments)
    assert not list((tmp_path / "store" / "pets").iterdir())


@pytest.fixture(params=["arrays", "biased", "flat"])
def biased_files(request, tmp_path):
    """Training images whose red tells the label and whose green tells the attribute, in each layout."""
    pairs = [(0, 0), (1, 1), (1, 0)]
    folder = tmp_path / "files" / request.param
    if request.param == "arrays":
        for split in ("train", "valid"):
            (folder / split).mkdir(parents=True)
            images = np.zeros((3, 8, 6, 3), np.uint8)
            images[..., :2] = np.array(pairs)[:, None, None]
            np.save(folder / split / "images.npy", images)
            np.save(folder / split / "attrs.npy", np.array(pairs, np.uint8))
        return folder
    for i, (label, attribute) in enumerate(pairs):
        image = Image.new("RGB", (6, 8), (label, attribute, 0))
        if request.param == "biased":
            part = "align" if label == attribute else "conflict"
            parts = [f"1pct/{part}/{label}", "1pct/valid", "test"]
            name = f"{i}_{label}_{attribute}.png"
        else:
            parts, name = ["train", "test"], f"{('diving', 'pole vaulting')[label]}_{i}.png"
        for part in parts:
            (folder / part).mkdir(parents=True, exist_ok=True)
            image.save(folder / part / name)
    return folder / "1pct" if request.param == "biased" else folder


def test_biased_files_come_back_with_label_and_attribute(tmp_path, biased_files, capsys):
    data_dir = str(tmp_path / "store")
    prepare_data.main(["colors", "--source", str(biased_files), "--data_dir", data_dir])
    layout = biased_files.relative_to(tmp_path / "files").parts[0]
    splits = {"arrays": ("train", "valid"), "biased": ("train", "valid", "test"), "flat": ("train", "test")}
    assert ", ".join(f"{split} 3" for split in splits[layout]) in capsys.readouterr().out
    columns = store.arrays("colors", "train", data_dir)
    assert columns["image"].shape == (3, 8, 6, 3)
    np.testing.assert_array_equal(columns["label"], columns["image"][:, 0, 0, 0])
    assert sorted(columns["label"]) == [0, 1, 1]
    assert ("attribute" in columns) == (layout != "flat")
    if layout != "flat":
        assert columns["attribute"].dtype == np.int32
        np.testing.assert_array_equal(columns["attribute"], columns["image"][:, 0, 0, 1])


def test_biased_image_files_are_resized_and_arrays_are_not(tmp_path, biased_files):
    data_dir = str(tmp_path / "store")
    arguments = ["colors", "--source", str(biased_files), "--data_dir", data_dir, "--size", "4"]
    if biased_files.name == "arrays":
        with pytest.raises(UserError, match=r"only for image folders \(layout 'arrays'\)"):
            prepare_data.main(arguments)
    else:
        prepare_data.main(arguments)
        assert store.arrays("colors", "test", data_dir)["image"].shape == (3, 4, 4, 3)


def test_a_table_of_metadata_and_nico_come_back_with_their_columns(tmp_path, capsys):
    files = tmp_path / "files"
    for name in ("dog/on_grass/1.png", "dog/running/1.png", "dog/in_street/1.png"):
        (files / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 6)).save(files / name)
    data_dir = str(tmp_path / "store")
    arguments = ["--source", str(files), "--data_dir", data_dir, "--size", "4"]
    prepare_data.main(["nico_dog", *arguments])
    assert "(train 1, val 1, test 1)" in capsys.readouterr().out
    columns = store.arrays("nico_dog", "train+test", data_dir)
    assert columns["image"].shape == (2, 4, 4, 3)
    assert sorted(columns["context"]) == [0, 1]  # of in_street, on_grass, running

    rows = ["path,y,split,place", "dog/on_grass/1.png,0,train,4", "dog/running/1.png,1,test,4"]
    (files / "metadata.csv").write_text("\n".join(rows))
    prepare_data.main(["by_table", *arguments])
    assert "(train 1, test 1)" in capsys.readouterr().out
    columns = store.arrays("by_table", "test", data_dir)
    assert (columns["label"].tolist(), columns["place"].tolist()) == ([1], [0])


def test_help_has_an_example_of_each_layout_with_attributes_or_metadata(capsys):
    with pytest.raises(SystemExit):
        prepare_data.main(["--help"])
    out = capsys.readouterr().out
    for example in (
        "train/images.npy",
        "align/0/1_0_0.png",
        "train/climbing_0.jpg",
        "arrays,folder,biased,flat,wilds,nico",
        "metadata.csv: img_filename,y,split,place",
        "dog/on_grass/1.jpg",
    ):
        assert example in out


def test_digits_need_no_source(tmp_path, capsys):
    assert prepare_data.main(["digits", "--data_dir", str(tmp_path)]) == 0
    assert "train 1200, test 597" in capsys.readouterr().out


def test_what_fails_inside_tfds_is_one_line(tmp_path, monkeypatch):
    def fail(builder):
        raise RuntimeError("no network\nhint")

    monkeypatch.setattr(store, "generate", fail)
    with pytest.raises(UserError, match=r"TFDS failed to make 'mnist' \(no network\); give files"):
        prepare_data.main(["mnist", "--data_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mnst"], "Did you mean 'mnist'?"),
        (["mnist", "--size", "4"], "--source DIR"),
        (["mnist", "--source", "FILES", "--size", "4"], "only for image folders"),
        (["mnist", "--source", "FILES", "--layout", "cifar"], "data_batch_1: no such file"),
        (["mnist", "--source", "FILES/absent"], "no such folder"),
        (["cifar10", "--source", "FILES"], "choose another name"),
    ],
)
def test_bad_arguments_name_the_mend(tmp_path, mnist_files, arguments, message):
    arguments = [argument.replace("FILES", str(mnist_files)) for argument in arguments]
    with pytest.raises(UserError) as error:
        prepare_data.main([*arguments, "--data_dir", str(tmp_path / "store")])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_ends_with_one_line_and_status_2(tmp_path, mnist_files):
    path = mnist_files / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    command = [sys.executable, "-m", "launch.prepare_data", "mnist"]
    done = subprocess.run(
        [*command, "--source", str(mnist_files), "--data_dir", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {path}: broken gzip file")
