"""Data sets as their authors distribute them: IDX files, CIFAR's pickles, folders of images.

Biased data sets, whose examples have an attribute beside their label, are read in `biased`; images with a
table of metadata in `wilds`; NICO, with its contexts, in `nico`.

Nothing here trusts a file. Sizes in a header are compared with the bytes that are there before anything
of that size is allocated, a pickle can build nothing but plain values, and every failure is a `UserError`
that names the file.
"""

import gzip
import io
import math
import pickle
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxlab.core import UserError

# No deflate stream is more than 1032 times smaller than what it holds, and a pixel takes at least a bit.
_MAX_PIXELS_PER_BYTE = 8 * 1032


class Split(NamedTuple):
    """One split of a raw data set.

    Attributes:
      count: the number of examples.
      examples: pairs of a unique key (TFDS orders a split by its hash) and an example: `image` (a Pillow
        image, or the bytes of a PNG or JPEG file), a number for each class feature, `id`.
    """

    count: int
    examples: Iterable[tuple[int | str, dict[str, Any]]]


class RawDataset(NamedTuple):
    """A raw data set, checked as far as that goes without decoding its images.

    Attributes:
      image_shape: height, width, channels; height and width are None where they differ between images.
      classes: for each class feature (`label`, perhaps `attribute`, `coarse_label` or `domain`) the names of
        its values.
      splits: the splits by name.
    """

    image_shape: tuple[int | None, int | None, int]
    classes: Mapping[str, list[str]]
    splits: Mapping[str, Split]


# --- IDX: MNIST, Fashion-MNIST, KMNIST ---


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, gzipped or not.

    The format: two zero bytes, an element type, the number of dimensions, each dimension as a big-endian
    uint32, the elements (http://yann.lecun.com/exdb/mnist).

    Returns:
      uint8 of the shape that the header gives; at least one element.

    Raises:
      UserError: wrong magic number or element type, fewer or more elements than the header says, or a
        broken gzip stream.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"  # not by name: downloads lose or keep a wrong ".gz"
            file.seek(0)
            return _parse_idx(gzip.GzipFile(fileobj=file) if zipped else file, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: broken gzip file ({error}); fetch it again.") from error


def _parse_idx(stream: io.BufferedIOBase, path: Path) -> np.ndarray:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != 0x08 or not 1 <= magic[3] <= 3:
        raise UserError(
            f"{path}: not an IDX file of unsigned bytes: it starts with '{magic.hex()}', not with '00000801'"
            " (labels) or '00000803' (images)."
        )
    header = stream.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise UserError(f"{path}: truncated in its header; fetch it again.")
    shape = struct.unpack(f">{magic[3]}I", header)
    size = math.prod(shape)
    if size == 0:
        raise UserError(f"{path}: holds no data (shape {shape}).")
    data = bytearray()
    while len(data) <= size and (chunk := stream.read(min(size + 1 - len(data), 1 << 20))):
        data += chunk  # grows with what is there, whatever the header claims
    if len(data) != size:
        found = f"only {len(data)}" if len(data) < size else "more"
        raise UserError(
            f"{path}: its header says {size} bytes of data {shape}, it has {found}; fetch it again."
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def idx_folder(source: Path) -> RawDataset:
    """Reads `train-` and `t10k-images-idx3-ubyte[.gz]` and their labels, as MNIST is distributed.

    Raises:
      UserError: a file is missing or damaged, or images and labels do not match.
    """
    arrays = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images_path = _idx_file(source, f"{prefix}-images", 3)
        labels_path = _idx_file(source, f"{prefix}-labels", 1)
        images, labels = read_idx(images_path), read_idx(labels_path)
        if images.ndim != 3 or labels.ndim != 1:
            wrong, ndim = (images_path, 3) if images.ndim != 3 else (labels_path, 1)
            raise UserError(f"{wrong}: expected {ndim} dimensions; are images and labels swapped?")
        if len(images) != len(labels):
            raise UserError(f"{labels_path}: {len(labels)} labels for {len(images)} images.")
        arrays[split] = images[..., None], {"label": labels}
    shapes = {split: images.shape[1:] for split, (images, _) in arrays.items()}
    if shapes["train"] != shapes["test"]:
        raise UserError(f"{source}: images are {shapes['train']} in train, {shapes['test']} in t10k.")
    num_classes = max(int(labels["label"].max()) for _, labels in arrays.values()) + 1
    return from_arrays(arrays, {"label": [str(i) for i in range(num_classes)]})


def _idx_file(source: Path, stem: str, ndim: int) -> Path:
    for name in (f"{stem}{dot}idx{ndim}-ubyte{suffix}" for dot in "-." for suffix in ("", ".gz")):
        if (source / name).is_file():
            return source / name
    raise UserError(f"{source / f'{stem}-idx{ndim}-ubyte[.gz]'}: no such file.")


def from_arrays(
    arrays: Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]], classes: Mapping[str, list[str]]
) -> RawDataset:
    """Makes a data set of images and labels in memory, or mapped into it.

    Args:
      arrays: for each split its images, uint8 [N, H, W, C] of one H, W and C, and for each class feature a
        column of N numbers. Among the splits is `train`. Ids tell the row: `train_00003`.
      classes: see `RawDataset`.
    """

    def examples(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        images, labels = arrays[split]
        for i, image in enumerate(images):
            pixels = image[..., 0] if image.shape[-1] == 1 else image
            values = {feature: int(column[i]) for feature, column in labels.items()}
            yield i, {"image": Image.fromarray(pixels), **values, "id": f"{split}_{i:05d}"}

    splits = {split: Split(len(images), examples(split)) for split, (images, _) in arrays.items()}
    return RawDataset(arrays["train"][0].shape[1:], classes, splits)


# --- Pickles, without running them ---


class _Inert:
    """Stands for whatever a pickle builds: remembers what it was given and does nothing with it."""

    state: Any = None

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any):
        self.state = state


class _Unpickler(pickle._Unpickler):
    """Loads plain values, and NumPy arrays as inert records.

    It is Python's own Unpickler and not the one in C, which reserves the memory that a length or a memo
    index claims before it looks whether the file goes on that far.
    """

    _ARRAY_PARTS = frozenset(
        (module, name)
        for package in ("numpy.core", "numpy._core")
        for module, name in (
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            (f"{package}.multiarray", "_reconstruct"),
            (f"{package}.numeric", "_frombuffer"),
        )
    )

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) in self._ARRAY_PARTS:
            return _Inert
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocol 2
            return lambda text, encoding: text.encode("latin1")
        raise UserError(f"refers to {f'{module}.{name}'!r}, which is no plain value: refused")

    def _load_bytearray(self) -> None:  # the inherited one allocates what the length claims
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: _load_bytearray}


def unpickle(path: Path) -> Any:
    """Reads a pickle of plain values without running anything that is in it.

    Strings that Python 2 wrote come as bytes, NumPy arrays as inert records.

    Raises:
      UserError: the file is missing, damaged, no pickle, or refers to anything but values and arrays.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        return _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except UserError as error:
        raise UserError(f"{path}: {error}.") from error
    except Exception as error:  # a damaged pickle can fail anywhere
        raise UserError(f"{path}: not a pickle, or damaged ({error!r}); fetch it again.") from error


# --- CIFAR-10 and CIFAR-100: the "python version" ---


def _by_name(values: Mapping[str | bytes, Any]) -> dict[str, Any]:
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in values.items()}


def _uint8_array(value: Any) -> np.ndarray:
    """An array from its inert record; raises ValueError or the like for anything else."""
    if value.state:  # what `ndarray.__reduce__` gives
        _, shape, dtype, fortran_order, data = value.state
        order = "F" if fortran_order else "C"
    else:  # `ndarray.__reduce_ex__(5)`
        data, dtype, shape, order = value.arguments
    if dtype.arguments[0] not in ("u1", b"u1"):
        raise ValueError(f"element type {dtype.arguments[0]}")
    return np.frombuffer(data, np.uint8).reshape(shape, order=order)  # a view: it must fit the data


def read_cifar(path: Path, label_keys: Mapping[str, str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Reads one batch file of CIFAR's python version, without running anything that is in it.

    Args:
      path: for example `data_batch_1` (CIFAR-10) or `train` (CIFAR-100).
      label_keys: from feature to key of the file, `{"label": "labels"}` in CIFAR-10.

    Returns:
      Images, uint8 [N, 32, 32, 3], and for each feature its labels, int32 [N].

    Raises:
      UserError: the file is missing, damaged, no CIFAR file, or refers to anything but arrays.
    """
    content = unpickle(path)
    try:
        values = _by_name(content)
        flat = _uint8_array(values["data"])
        images = flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # stored as planes of red, green, blue
        labels = {feature: np.asarray(values[key], np.int32) for feature, key in label_keys.items()}
        if len(images) == 0 or any(column.shape != images.shape[:1] for column in labels.values()):
            raise ValueError(f"{len(images)} images, labels {[c.shape for c in labels.values()]}")
    except Exception as error:  # the values can be anything
        raise UserError(f"{path}: not a CIFAR batch ({error!r}); fetch it again.") from error
    return images, labels


def cifar_folder(source: Path) -> RawDataset:
    """Reads the unpacked `cifar-10-batches-py` or `cifar-100-python`.

    Raises:
      UserError: a file is missing or damaged, or a label has no name.
    """
    if (source / "train").is_file():
        files = {"train": ["train"], "test": ["test"]}
        features = {  # name: its key in the batches, the key of its class names, their number
            "label": ("fine_labels", "fine_label_names", 100),
            "coarse_label": ("coarse_labels", "coarse_label_names", 20),
        }
        meta = source / "meta"
    else:
        files = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
        features = {"label": ("labels", "label_names", 10)}
        meta = source / "batches.meta"
    arrays = {}
    for split, names in files.items():
        batches = [
            read_cifar(source / name, {f: key for f, (key, _, _) in features.items()}) for name in names
        ]
        for name, (_, labels) in zip(names, batches):
            for feature, (_, _, size) in features.items():
                if labels[feature].min() < 0 or labels[feature].max() >= size:
                    raise UserError(f"{source / name}: a {feature} is outside 0..{size - 1}.")
        arrays[split] = (
            np.concatenate([images for images, _ in batches]),
            {feature: np.concatenate([labels[feature] for _, labels in batches]) for feature in features},
        )
    content = unpickle(meta)
    try:
        class_names = _by_name(content)
        classes = {
            feature: [name.decode() for name in class_names[key]] for feature, (_, key, _) in features.items()
        }
        if any(len(set(classes[feature])) != size for feature, (_, _, size) in features.items()):
            raise ValueError("wrong number of names")
    except Exception as error:  # the values can be anything
        raise UserError(f"{meta}: not CIFAR's class names ({error!r}); fetch it again.") from error
    return from_arrays(arrays, classes)


# --- Folders of images ---


def image_folder(source: Path, size: int | None = None) -> RawDataset:
    """Reads `domain/class/*.png|jpg`; each domain becomes a split, and the feature `domain`.

    A space in a domain's name becomes _ there. A domain is thus chosen with TFDS's own split strings:
    `"photo"`, `"photo[:80%]"`, `"photo+sketch"`, `"all"`. Folders named `train` and `test` in place of
    domains become the usual splits. Images become RGB; files that are so already are stored as they are.

    Args:
      source: the folder of the domains.
      size: resizes every image to `size` × `size` pixels (bilinear, without regard to its proportions).

    Raises:
      UserError: the folders are not laid out so, or a file's header is broken. A file that is broken
        further on raises when its example is read.
    """
    paths = {}
    for folder in folders(source):
        name = folder.name.replace(" ", "_")  # OfficeHome has "Real World"
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name == "all":
            raise UserError(f"{folder}: cannot be the name of a split; use letters, digits and _.")
        if name in paths:
            raise UserError(f"{folder}: another folder has this name, with _ for a space; rename one.")
        paths[name] = [path for f in folders(folder) for path in image_files(f)]
        if not paths[name]:
            raise UserError(f"{folder}: no images; expected {folder}/<class>/*.png or *.jpg.")
    if not paths:
        raise UserError(f"{source}: no folders; expected {source}/<domain>/<class>/*.png or *.jpg.")
    domains = list(paths)
    classes = sorted({path.parent.name for found in paths.values() for path in found})

    def listed(domain: str) -> Iterator[tuple[str, Path, dict[str, int]]]:
        for path in paths[domain]:
            labels = {"label": classes.index(path.parent.name), "domain": domains.index(domain)}
            yield path.relative_to(source).as_posix(), path, labels

    files = {domain: list(listed(domain)) for domain in domains}
    return from_files(files, {"label": classes, "domain": domains}, size)


def from_files(
    files: Mapping[str, Sequence[tuple[str, Path, Mapping[str, int]]]],
    classes: Mapping[str, list[str]],
    size: int | None,
) -> RawDataset:
    """Makes a data set of image files, which are opened when their example is read.

    Args:
      files: for each split its examples: an id, unique in the split; a PNG or JPEG file; a number for each
        class feature.
      classes: see `RawDataset`.
      size: see `image_folder`; where it is None, the headers of all files are read.

    Raises:
      UserError: a file's header is broken.
    """

    def examples(split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for key, path, labels in files[split]:
            yield key, {"image": _read_image(path, size), **labels, "id": key}

    width = height = size
    if size is None:
        paths = (path for found in files.values() for _, path, _ in found)
        sizes = {_with_image(path, lambda image, content: image.size) for path in paths}
        width, height = sizes.pop() if len(sizes) == 1 else (None, None)
    splits = {split: Split(len(found), examples(split)) for split, found in files.items()}
    return RawDataset((height, width, 3), classes, splits)


def folders(folder: Path) -> list[Path]:
    """The folders in a folder in order of their names, without the hidden ones."""
    return sorted(path for path in folder.glob("[!.]*") if path.is_dir())


def image_files(folder: Path) -> list[Path]:
    """The PNG and JPEG files in a folder in order of their names, without the hidden ones."""
    return sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))


def _read_image(path: Path, size: int | None) -> bytes | Image.Image:
    def read(image: Image.Image, content: bytes) -> bytes | Image.Image:
        image.load()  # the whole file is checked here, while its name is known
        if size is not None:
            return image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        return content if image.mode == "RGB" else image.convert("RGB")

    return _with_image(path, read)


def _with_image(path: Path, read: Callable[[Image.Image, bytes], Any]) -> Any:
    try:
        # From memory, where a read is as long as what is there; from a file, as long as a chunk claims to be.
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > _MAX_PIXELS_PER_BYTE * len(content):
                raise ValueError(f"{image.width} × {image.height} pixels cannot be in a file of this size")
            return read(image, content)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise UserError(f"{path}: broken image ({error}); replace or remove it.") from error


def find_layout(source: Path) -> str:
    """The layout of the files in `source`: "idx", "cifar", "arrays", "biased", "wilds", "flat" or "folder".

    Raises:
      UserError: there is no such folder, none of the layouts is in it, or several data sets are.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such folder.")
    names = {path.name for path in source.iterdir()}
    if any(re.fullmatch(r"(train|t10k)-(images|labels)[-.]idx.*", name) for name in names):
        return "idx"
    if names & {"data_batch_1", "test_batch"} or ("train" in names and (source / "train").is_file()):
        return "cifar"
    if any((source / split / "images.npy").exists() for split in ("train", "valid")):
        return "arrays"
    if names & {"align", "conflict"}:
        return "biased"
    if "metadata.csv" in names:
        return "wilds"
    if image_files(source / "train") and not folders(source / "train"):
        return "flat"
    for folder in folders(source):
        if (folder / "align").is_dir():  # one share of bias-conflicting examples of several
            raise UserError(f"{source}: not one data set but a folder of them; give one, such as {folder}.")
    if any(image_files(f) for folder in folders(source) for f in folders(folder)):
        return "folder"
    raise UserError(
        f"{source}: expected train-images-idx3-ubyte[.gz] (IDX), data_batch_1 or train (CIFAR pickles),"
        " train/images.npy (arrays), align/ and conflict/ (biased), metadata.csv (wilds),"
        " train/<class>_*.png|jpg (flat) or <domain>/<class>/*.png|jpg (folder)."
    )
