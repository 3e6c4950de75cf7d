"""Images listed in a table with their split, label and metadata, as WILDS distributes Waterbirds and CelebA.

As in `raw`, no file is trusted and every failure is a `UserError` that names it, here with the line.
"""

import csv
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from jaxlab.core import UserError
from jaxlab.data import raw

SPLITS = ("train", "val", "test", "id_val", "id_test")
# Beyond these each of WILDS's data sets numbers its splits in its own way.
_NUMBERED_SPLITS = {"0": "train", "1": "val", "2": "test"}
_PATH_COLUMNS = ("filename", "path", "img_filename")
_LABEL_COLUMNS = ("label", "y")


def metadata_folder(source: Path, size: int | None = None) -> raw.RawDataset:
    """Reads the images that `metadata.csv` lists: a line each, below a line with the names of the columns.

    Columns: the image's path within the folder (`filename`, `path` or `img_filename`); `split` (train, val,
    test, id_val, id_test, where val and test are out of distribution; or 0, 1, 2 for the first three); the
    label (`label` or `y`). Every other column becomes a class feature too, metadata to group by, except where
    it can tell no groups: each row has another value, or numbers with fractions. The values of a feature are
    numbered in sorted order, numbers by their size; over all splits, so that they mean the same in each.
    (Koh, Sagawa et al. 2021, https://github.com/p-lambda/wilds)

    Args:
      source: the folder of `metadata.csv`.
      size: see `raw.image_folder`.

    Raises:
      UserError: the table is missing or damaged, a column is missing, a value is empty, a split is none of
        these, a path leaves the folder or is listed twice in a split, an image is missing or its header is
        broken.
    """
    path = source / "metadata.csv"
    columns, lines = _read_table(path)
    taken = [_only(columns, names, path) for names in (_PATH_COLUMNS, ("split",), _LABEL_COLUMNS)]
    paths, splits, labels = (columns[name] for name in taken)
    metadata = {name: values for name, values in columns.items() if name not in taken}
    features = {"label": labels} | {k: values for k, values in metadata.items() if _tells_groups(values)}
    for name in features:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name in ("image", "id", "index"):
            raise UserError(
                f"{path}: column '{name}' cannot be the name of a feature; rename it with letters, digits and"
                " _ (image, id and index are taken)."
            )
    classes = {name: _sorted_values(values) for name, values in features.items()}
    numbers = {name: {value: i for i, value in enumerate(values)} for name, values in classes.items()}
    files: dict[str, list[tuple[str, Path, dict[str, int]]]] = {name: [] for name in SPLITS}
    seen: set[tuple[str, str]] = set()
    folder = Path(os.path.realpath(source))
    for i, line in enumerate(lines):
        split = _NUMBERED_SPLITS.get(splits[i], splits[i])
        if split not in SPLITS:
            raise UserError(
                f"{path}, line {line}: split '{splits[i]}'; write {', '.join(SPLITS)}, or 0, 1 or 2 for the"
                " first three."
            )
        if not _is_inside(folder / paths[i], folder):
            raise UserError(f"{path}, line {line}: '{paths[i]}' is not inside {source}; move it there.")
        if not os.path.isfile(source / paths[i]):
            raise UserError(f"{path}, line {line}: {source / paths[i]}: no such file.")
        if (split, paths[i]) in seen:
            raise UserError(f"{path}, line {line}: '{paths[i]}' is listed twice in {split}; remove one.")
        seen.add((split, paths[i]))
        example = {name: numbers[name][values[i]] for name, values in features.items()}
        files[split].append((paths[i], source / paths[i], example))
    return raw.from_files({name: found for name, found in files.items() if found}, classes, size)


def _read_table(path: Path) -> tuple[dict[str, list[str]], list[int]]:
    """The columns [N] of a CSV file, text without spaces around it, and the line of each row."""
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                if row:  # not a blank line
                    rows.append([value.strip() for value in row])
                    lines.append(reader.line_num)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}, after line {lines[-1] if lines else 0}: not a CSV file in UTF-8 ({error})."
        ) from error
    if len(rows) < 2:
        raise UserError(f"{path}: lists no images; expected a line of column names and a line an image.")
    names, *rows = rows
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path}: column '{min(twice)}' is there twice; remove one.")
    for line, row in zip(lines[1:], rows):
        if len(row) != len(names):
            raise UserError(f"{path}, line {line}: {len(row)} values for {len(names)} columns.")
        for name, value in zip(names, row):
            if not value or not value.isprintable():
                fault = "holds a control character" if value else "is empty"
                raise UserError(f"{path}, line {line}: column '{name}' {fault}; write a value there.")
    return dict(zip(names, map(list, zip(*rows)))), lines[1:]


def _only(columns: Collection[str], names: Sequence[str], path: Path) -> str:
    """The one of `names` that is a column."""
    found = [name for name in names if name in columns]
    if len(found) != 1:
        has = f"{' and '.join(found)} are there" if found else f"it has {', '.join(columns)}"
        raise UserError(f"{path}: expected one column {' or '.join(names)}; {has}.")
    return found[0]


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path stays in a resolved folder, links followed."""
    return Path(os.path.realpath(path)).is_relative_to(folder)


def _tells_groups(values: Sequence[str]) -> bool:
    return len(set(values)) < len(values) and (_are(int, values) or not _are(float, values))


def _sorted_values(values: Sequence[str]) -> list[str]:
    in_order = sorted(set(values))
    return sorted(in_order, key=int) if _are(int, values) else in_order


def _are(kind: type, values: Sequence[str]) -> bool:
    try:
        for value in values:
            kind(value)
    except ValueError:
        return False
    return True
