"""NICO: animals and vehicles in contexts, with the contexts that published comparisons hold out.

Y. He, Z. Shen and P. Cui, *Towards Non-I.I.D. Image Classification: A Dataset and Baselines*, Pattern
Recognition 2021 (arXiv 1906.02899). It has no official split; this one is that of DecAug (Bai et al., AAAI
2021; https://github.com/HaoyueBaiZJU/DecAug): of each class one context is for validation, one for the test
and the others, about eight, are for training.
"""

from collections.abc import Iterable
from pathlib import Path

from jaxlab.core import UserError
from jaxlab.data import raw

HELD_OUT = {  # class: the contexts of validation and test
    "animal": {
        "bear": ("on_tree", "white"),
        "bird": ("on_shoulder", "in_hand"),
        "cat": ("on_tree", "in_street"),
        "cow": ("spotted", "standing"),
        "dog": ("running", "in_street"),
        "elephant": ("in_circus", "in_street"),
        "horse": ("running", "in_street"),
        "monkey": ("climbing", "sitting"),
        "rat": ("running", "in_hole"),
        "sheep": ("at_sunset", "on_road"),
    },
    "vehicle": {
        "airplane": ("in_sunrise", "with_pilot"),
        "bicycle": ("in_garage", "velodrome"),
        "boat": ("cross_bridge", "at_wharf"),
        "bus": ("at_yard", "aside_tree"),
        "car": ("at_park", "on_track"),
        "helicopter": ("on_sea", "in_forest"),
        "motorcycle": ("in_garage", "on_track"),
        "train": ("subway", "in_forest"),
        "truck": ("in_race", "in_forest"),
    },
}


def is_nico(source: Path) -> bool:
    """Whether a folder holds nothing but classes of one half of NICO, each with its held-out contexts."""
    classes = {folder.name: _contexts(folder) for folder in raw.folders(source)}
    held_out = _half(classes)
    return held_out is not None and all(found.keys() >= set(held_out[c]) for c, found in classes.items())


def nico_folder(source: Path, size: int | None = None) -> raw.RawDataset:
    """Reads `<class>/<context>/*.png|jpg` of NICO-Animal or NICO-Vehicle, or of some of their classes.

    Splits are `train`, `val` and `test`, see above; class features `label` and `context`. The contexts of all
    classes and splits are numbered together, in sorted order: `in_street` is one context, whether of cats or
    of dogs. (DecAug's code numbers those of each split anew.) A space in the name of a context counts as `_`.

    Args:
      source: the folder of the classes.
      size: see `raw.image_folder`.

    Raises:
      UserError: a folder is no class, a class lacks a held-out context or any other, a context has no
        images, or a file's header is broken.
    """
    classes = [folder.name for folder in raw.folders(source)]
    held_out = _half(classes)
    if held_out is None:
        known = "; or ".join(", ".join(of) for of in HELD_OUT.values())
        raise UserError(f"{source}: expected a folder for each class: {known}. It has: {', '.join(classes)}.")
    found: dict[str, list[tuple[Path, int, str]]] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(classes):
        split_of = dict(zip(held_out[name], ("val", "test")))
        contexts = _contexts(source / name)
        if len(contexts) < len(raw.folders(source / name)):
            raise UserError(
                f"{source / name}: a context is there with a space and with _; merge the folders."
            )
        for context in held_out[name]:
            if context not in contexts:
                raise UserError(
                    f"{source / name / context}: no such folder; it is {split_of[context]} of {name}."
                )
        if len(contexts) == len(split_of):
            raise UserError(f"{source / name}: no contexts to train on besides {' and '.join(split_of)}.")
        for context, folder in contexts.items():
            paths = raw.image_files(folder)
            if not paths:
                raise UserError(f"{folder}: no images; expected {folder}/*.png or *.jpg.")
            found[split_of.get(context, "train")] += [(path, label, context) for path in paths]
    names = sorted({context for listed in found.values() for _, _, context in listed})
    files = {
        split: [
            (path.relative_to(source).as_posix(), path, {"label": label, "context": names.index(context)})
            for path, label, context in listed
        ]
        for split, listed in found.items()
    }
    return raw.from_files(files, {"label": classes, "context": names}, size)


def _half(classes: Iterable[str]) -> dict[str, tuple[str, str]] | None:
    """The held-out contexts of the animals or of the vehicles, whichever the classes belong to."""
    names = set(classes)
    return next((of for of in HELD_OUT.values() if names and of.keys() >= names), None)


def _contexts(folder: Path) -> dict[str, Path]:
    return {path.name.replace(" ", "_"): path for path in raw.folders(folder)}
