"""A table of images keeps its splits, labels and metadata; what is wrong in it is one line that names it."""

import pytest
from PIL import Image

from jaxlab.core import UserError
from jaxlab.data import raw, store, wilds

ROWS = [
    # id, file, y, split, place, weather, weight
    "1,a/1.png,0,0,10,sunny,0.5",
    "2,a/2.png,1,2,9,rainy,0.5",
    "3,b/3.jpg,1,1,10,rainy,2",
    "4,b/4.png,0,0,9,sunny,1.5",
]
HEADER = "img_id,img_filename,y,split,place,weather,weight"


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("a/1.png", "a/2.png", "b/3.jpg", "b/4.png")):
        path = tmp_path / "birds" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (i, 0, 0)).save(path)
    write(tmp_path / "birds", HEADER, *ROWS)
    return tmp_path / "birds"


def write(folder, *lines, encoding="utf-8"):
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding=encoding)


def read(folder, *features):
    """For each split the file and the names of the features of each example."""
    dataset = wilds.metadata_folder(folder)
    return {
        name: [
            (example["id"], *(dataset.classes[feature][example[feature]] for feature in features))
            for _, example in split.examples
        ]
        for name, split in dataset.splits.items()
    }


def one_line(folder):
    with pytest.raises(UserError) as error:
        read(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_column_that_can_tell_groups_is_a_feature(folder):
    assert raw.find_layout(folder) == "wilds"
    dataset = wilds.metadata_folder(folder)
    assert dataset.image_shape == (5, 6, 3)
    assert dataset.classes == {"label": ["0", "1"], "place": ["9", "10"], "weather": ["rainy", "sunny"]}
    assert read(folder, "label", "place", "weather") == {
        "train": [("a/1.png", "0", "10", "sunny"), ("b/4.png", "0", "9", "sunny")],
        "val": [("b/3.jpg", "1", "10", "rainy")],
        "test": [("a/2.png", "1", "9", "rainy")],
    }
    assert wilds.metadata_folder(folder, size=4).image_shape == (4, 4, 3)


def test_splits_may_have_all_five_names_and_text_any_form_of_csv(folder):
    names = ["id_test", "id_val", "train", "test"]
    rows = [f'{split}, "{path}" ,"a, b",x' for split, path in zip(names, ("a/1.png", "a/2.png", "b/3.jpg"))]
    write(folder, "split,path,label,where", *rows, "", "val,b/4.png,ä,y", encoding="utf-8-sig")
    (folder / "metadata.csv").write_text(
        (folder / "metadata.csv").read_text("utf-8-sig").replace(", ", ",").replace(" ,", ",")
    )
    assert read(folder, "label", "where") == {
        "train": [("b/3.jpg", "a,b", "x")],
        "val": [("b/4.png", "ä", "y")],
        "id_val": [("a/2.png", "a,b", "x")],
        "id_test": [("a/1.png", "a,b", "x")],
    }


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "lists no images"),
        ([HEADER], "lists no images"),
        (["img,y,split", "a/1.png,0,0"], "one column filename or path or img_filename; it has img, y, split"),
        (["path,filename,y,split", "a/1.png,a/1.png,0,0"], "filename and path are there"),
        (["path,y,label,split", "a/1.png,0,0,0"], "expected one column label or y; label and y are there"),
        (["path,split", "a/1.png,0"], "expected one column label or y; it has path, split"),
        (["path,y", "a/1.png,0"], "expected one column split; it has path, y"),
        (["path,y,y,split", "a/1.png,0,0,0"], "column 'y' is there twice"),
        (["path,y,split", "a/1.png,0,0", "a/2.png,0"], "line 3: 2 values for 3 columns"),
        (["path,y,split", "a/1.png,,0"], "line 2: column 'y' is empty"),
        (["path,y,split", 'a/1.png,"a\nb",0'], "line 3: column 'y' holds a control character"),
        (["path,y,split", "a/1.png,0,dev"], "line 2: split 'dev'; write train, val, test, id_val, id_test"),
        (["path,y,split", "a/1.png,0,0", "", "a/2.png,0,3"], "line 4: split '3'; write train"),
        (["path,y,split", "a/1.png,0,0", "a/9.png,0,0"], "line 3: "),
        (["path,y,split", "a,0,0"], "a: no such file"),
        (["path,y,split", f"{'a' * 5000},0,0"], "no such file"),
        (["path,y,split", "../birds.png,0,0"], "line 2: '../birds.png' is not inside"),
        (["path,y,split", "/etc/hosts,0,0"], "line 2: '/etc/hosts' is not inside"),
        (["path,y,split", "outside/1.png,0,0"], "line 2: 'outside/1.png' is not inside"),
        (["path,y,split", "loop,0,0"], "line 2"),
        (["path,y,split", "a/1.png,0,0", "a/1.png,1,0"], "line 3: 'a/1.png' is listed twice in train"),
        (["path,y,split,id", *(f"a/{i}.png,0,0,7" for i in (1, 2))], "column 'id' cannot be the name"),
        (["path,y,split,a b", *(f"a/{i}.png,0,0,7" for i in (1, 2))], "column 'a b' cannot be the name"),
        (["path,y,split", '"a/1.png,0,0'], "after line 1: not a CSV file in UTF-8"),
        (["path,y,split", f'"{"a" * 200_000}",0,0'], "after line 1: not a CSV file in UTF-8"),
        (["path,y,split", "metadata.csv,0,0"], "metadata.csv: broken image"),
    ],
)
def test_what_is_wrong_in_a_table_is_one_line_that_names_it(folder, lines, message):
    (folder / "outside").symlink_to(folder.parent)
    (folder / "loop").symlink_to("loop")
    write(folder, *lines)
    error = one_line(folder)
    assert str(folder / "metadata.csv") in error
    assert message in error


@pytest.mark.parametrize("content", [b"path,y,split\n\xff,0,0\n", b"\x89PNG\r\n\x1a\n\0\0\r"])
def test_a_file_that_is_no_text_is_named(folder, content):
    (folder / "metadata.csv").write_bytes(content)
    assert f"{folder / 'metadata.csv'}, after line" in one_line(folder)


def test_without_a_table_or_with_a_broken_image_the_file_is_named(folder):
    (folder / "a" / "2.png").write_bytes(b"<svg/>")
    assert f"{folder / 'a' / '2.png'}: broken image" in one_line(folder)
    (folder / "metadata.csv").unlink()
    assert f"{folder / 'metadata.csv'}: no such file" in one_line(folder)


def test_a_stored_data_set_has_the_metadata_as_columns(tmp_path, folder):
    data_dir = str(tmp_path / "store")
    store.generate(store.raw_builder("birds", wilds.metadata_folder(folder), data_dir))
    columns = store.arrays("birds", "train+test", data_dir)
    assert set(columns) == {"image", "label", "place", "weather"}
    found = {
        row[0]: row[1:] for row in zip(columns["image"][:, 0, 0, 0], *map(columns.get, ("label", "place")))
    }
    assert found == {0: (0, 1), 1: (1, 0), 3: (0, 0)}
