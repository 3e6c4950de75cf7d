"""Biased data sets as their authors distribute them: LfF's arrays, LDD's folders, BAR.

Each example has a `label` and, where its authors tell it, an `attribute` that goes with the label in nearly
all training examples, the bias-aligned ones; the rest are bias-conflicting. As in `raw`, no file is trusted
and every failure is a `UserError` that names it.
"""

import re
from pathlib import Path

import numpy as np

from jaxlab.core import UserError
from jaxlab.data import raw

_MAX_CLASSES = 256  # what LfF's bytes can hold; keeps a stray number from becoming a million classes


# --- Arrays, as LfF's `make_dataset.py` writes them ---


def array_folder(source: Path) -> raw.RawDataset:
    """Reads `train/` and `valid/`, each with `images.npy` and `attrs.npy`.

    `images.npy` is uint8 [N, H, W, 3] and stays on disk until an example is read; `attrs.npy` is integers
    [N, 2], label and attribute. Beside the splits, `attr_names.pkl` (a pickled list) or `attr_names.txt` (a
    name a line) may name these two columns: with `digit` and `color`, label 3 is called "digit 3" in place of
    "3". The examples are in the order of the files. (Nam et al. 2020, https://github.com/alinlab/LfF)

    Raises:
      UserError: a file is missing or damaged, of another type or shape, or images and labels do not match.
    """
    arrays = {}
    for split in ("train", "valid"):
        images_path, attrs_path = (source / split / name for name in ("images.npy", "attrs.npy"))
        images, attrs = _open_npy(images_path), _open_npy(attrs_path)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.size == 0:
            raise UserError(
                f"{images_path}: holds {images.dtype} {images.shape}; save images as uint8 (N, H, W, 3)."
            )
        if attrs.dtype.kind not in "iu" or attrs.ndim != 2 or attrs.shape[1] != 2:
            raise UserError(
                f"{attrs_path}: holds {attrs.dtype} {attrs.shape}; save label and attribute as uint8 (N, 2)."
            )
        if len(images) != len(attrs):
            raise UserError(f"{attrs_path}: {len(attrs)} rows for {len(images)} images; save one for each.")
        if attrs.min() < 0 or attrs.max() >= _MAX_CLASSES:
            raise UserError(
                f"{attrs_path}: values from {attrs.min()} to {attrs.max()}; number labels and attributes from"
                f" 0 to at most {_MAX_CLASSES - 1}."
            )
        arrays[split] = images, {"label": attrs[:, 0], "attribute": attrs[:, 1]}
    shapes = {split: images.shape[1:] for split, (images, _) in arrays.items()}
    if shapes["train"] != shapes["valid"]:
        raise UserError(
            f"{source}: images are {shapes['train']} in train, {shapes['valid']} in valid; save them alike."
        )
    prefixes = [f"{name} " for name in _attr_names(source)] or ["", ""]
    classes = {}
    for feature, prefix in zip(("label", "attribute"), prefixes):
        size = max(int(columns[feature].max()) for _, columns in arrays.values()) + 1
        classes[feature] = [f"{prefix}{i}" for i in range(size)]
    return raw.from_arrays(arrays, classes)


def _open_npy(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path}: no such file; train/ and valid/ need images.npy and attrs.npy each.")
    try:
        with open(path, "rb") as file:
            start = file.read(12)  # the magic string, the version, and the header's length in 2 or 4 bytes
        length = int.from_bytes(start[8:10] if start[6:7] == b"\x01" else start[8:12], "little")
        if length > path.stat().st_size:
            raise ValueError(f"its header claims {length} bytes")  # NumPy would reserve them
        return np.lib.format.open_memmap(path, mode="r")  # unlike np.load, neither pickles nor archives
    except Exception as error:  # a damaged header can fail anywhere
        raise UserError(
            f"{path}: not an array of numbers, or damaged ({error!r}); write it again with numpy.save."
        ) from error


def _attr_names(source: Path) -> list[str]:
    """The names of label and attribute, or nothing where there is no file of them."""
    pickled, text = source / "attr_names.pkl", source / "attr_names.txt"
    path = pickled if pickled.exists() else text
    if not path.exists():
        return []
    names = raw.unpickle(path) if path == pickled else path.read_text("utf-8", "replace").splitlines()
    valid = isinstance(names, list) and all(isinstance(name, str) and name.isprintable() for name in names)
    if not valid or len(names) != 2:
        raise UserError(f"{path}: expected two names, of the label and of the attribute; mend or remove it.")
    return names


# --- Folders of aligned and conflicting images, as LDD and BiasEnsemble ship them ---


def biased_folder(source: Path, size: int | None = None) -> raw.RawDataset:
    """Reads `align/`, `conflict/`, `valid/` and `test/`, with images by class or directly inside.

    Label and attribute are the last two fields of a file's name, `..._<label>_<attribute>.png`. `align` and
    `conflict` together are the split `train`. `source` is one share of conflicting examples, `cmnist/1pct`;
    what its shares have in common may lie above them: `valid` and `test` are looked for beside `align`, then
    one level up. The examples of a folder are in order of their paths.

    All files of BFFHQ's `test` are kept, while its authors report the accuracy over those with
    label ≠ attribute; that is for the evaluation to choose.
    (Lee et al. 2021, https://github.com/kakaoenterprise/Learning-Debiased-Disentangled)

    Args:
      source: the folder of `align` and `conflict`.
      size: see `raw.image_folder`.

    Raises:
      UserError: a folder is missing or empty, a file's name lacks the two numbers or contradicts its folder,
        or its header is broken.
    """
    folders = {"train": [source / "align", source / "conflict"]}
    for split in ("valid", "test"):
        places = (source / split, source.resolve().parent / split)
        found = [place for place in places if place.is_dir()]
        if not found:
            raise UserError(f"{places[0]}: no such folder, nor one level up; split '{split}' goes there.")
        folders[split] = found[:1]
    files = {
        split: [
            (path.relative_to(folder.parent).as_posix(), path, _fields(path))
            for folder in parts
            for path in _images_within(folder)
        ]
        for split, parts in folders.items()
    }
    classes = {}
    for feature in ("label", "attribute"):
        largest = max(fields[feature] for listed in files.values() for _, _, fields in listed)
        classes[feature] = [str(i) for i in range(largest + 1)]
    return raw.from_files(files, classes, size)


def _images_within(folder: Path) -> list[Path]:
    paths = [path for f in (folder, *raw.folders(folder)) for path in raw.image_files(f)]
    if not paths:
        raise UserError(f"{folder}: no images; expected {folder}/<class>/*_<label>_<attribute>.png or .jpg.")
    return sorted(paths)


def _fields(path: Path) -> dict[str, int]:
    """Label and attribute of a file by its name."""
    match = re.search(r"(?:^|_)([0-9]+)_([0-9]+)$", path.stem)
    if match is None:
        raise UserError(f"{path}: its name does not end in _<label>_<attribute>, two numbers; rename it.")
    label, attribute = (int(field) for field in match.groups())
    if max(label, attribute) >= _MAX_CLASSES:
        raise UserError(
            f"{path}: label {label} and attribute {attribute} by its name; number them from 0 to at most"
            f" {_MAX_CLASSES - 1}."
        )
    folder = path.parent.name
    if folder.isdecimal() and int(folder) != label:
        raise UserError(f"{path}: label {label} by its name, {folder} by its folder; rename or move it.")
    return {"label": label, "attribute": attribute}


# --- BAR: the class in the file's name ---


def flat_folder(source: Path, size: int | None = None) -> raw.RawDataset:
    """Reads `train/` and `test/`, with the class in a file's name before its last `_`.

    So comes BAR (https://github.com/alinlab/BAR): `train/climbing_0.jpg`, `test/pole vaulting_279.jpg`. It
    does not tell the place an action is tied to: there is no `attribute`.

    Args:
      source: the folder of `train` and `test`.
      size: see `raw.image_folder`.

    Raises:
      UserError: a folder is missing or empty, a file's name has no class, or its header is broken.
    """
    paths = {split: raw.image_files(source / split) for split in ("train", "test")}
    for split, found in paths.items():
        if not found:
            raise UserError(
                f"{source / split}: no images; expected {source / split}/<class>_<number>.png or .jpg."
            )
    names = {path: path.stem.rpartition("_")[0] for found in paths.values() for path in found}
    for path, name in names.items():
        if not name:
            raise UserError(f"{path}: its name is not <class>_<number>; rename it.")
    classes = sorted(set(names.values()))
    files = {
        split: [(f"{split}/{path.name}", path, {"label": classes.index(names[path])}) for path in found]
        for split, found in paths.items()
    }
    return raw.from_files(files, {"label": classes}, size)
