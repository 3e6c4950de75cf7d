"""The one store of data sets: TFDS folders in array_record format, read and written without TensorFlow."""

import contextlib
import functools
import io
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from jaxlab.core import UserError
from jaxlab.core.errors import nearest
from jaxlab.data import digits, raw

# Images are decoded with Pillow, on purpose; TFDS would advise OpenCV in every run's output.
logging.getLogger("absl").addFilter(lambda record: "OpenCV is not installed" not in record.getMessage())


def data_folder(data_dir: str | None = None) -> str:
    """Where data sets lie: `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets, as in TFDS."""
    return os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


# --- Reading ---


def open_builder(dataset: str, data_dir: str | None = None) -> tfds.core.DatasetBuilder:
    """Opens a prepared data set; `digits` is prepared on first use.

    Args:
      dataset: TFDS's name, `"name"`, `"name/config"` or `"name:1.0.0"`.
      data_dir: see `data_folder`.

    Raises:
      UserError: the data set is not there (the message has the command that makes it), or is damaged.
    """
    folder = data_folder(data_dir)
    path = os.path.join(folder, dataset.partition(":")[0])
    try:
        with _naming_damage(path):
            if dataset == "digits":
                generate(digits.Digits(data_dir=folder, file_format="array_record"))
            return read_only_builder.builder_from_files(dataset, data_dir=folder)
    except (tfds.core.DatasetNotFoundError, ValueError):  # ValueError: it cannot be a name
        raise UserError(
            f"data set '{dataset}': not in {path}. This makes it: python -m launch.prepare_data {dataset}"
            f" --source DIR --data_dir {folder}"
        ) from None


def open_source(dataset: str, split: str, data_dir: str | None = None) -> Sequence[dict[str, Any]]:
    """Opens a split for random access: `source[i]` is a dict of NumPy values, `len(source)` their number.

    Args:
      dataset: see `open_builder`.
      split: TFDS's split string, such as `"train"`, `"train[:1000]"`, `"photo+sketch"`, `"all"`.
      data_dir: see `data_folder`.

    Raises:
      UserError: no such data set or split, or not in array_record format.
    """
    builder = open_builder(dataset, data_dir)
    try:
        source = builder.as_data_source(split)
        size = len(source)
    except NotImplementedError as error:
        raise UserError(f"{builder.data_dir}: not in array_record format; prepare it again.") from error
    except ValueError as error:
        splits = ", ".join(f"{name} ({info.num_examples})" for name, info in builder.info.splits.items())
        raise UserError(f"data set '{dataset}' has no split '{split}'. It has: {splits}.") from error
    if size == 0:
        raise UserError(f"data set '{dataset}': split '{split}' is empty.")
    return source


def read(source: Sequence[dict[str, Any]], indices: Iterable[int]) -> dict[str, np.ndarray]:
    """Reads examples of a split as columns: its numeric features; text cannot go to a device.

    Returns:
      `image` uint8 [N, H, W, C], integers such as `label` and `domain` int32 [N]. Row n is `source[i]`
      for the n-th index, where its other features (`id`) can be looked up.

    Raises:
      UserError: a file is missing or damaged, or the images differ in size.
    """
    info = source.dataset_info
    names = [name for name, feature in info.features.items() if _is_numeric(feature)]
    ragged = [name for name in names if None in info.features[name].shape]
    if ragged:
        raise UserError(
            f"data set '{info.name}': sizes of '{ragged[0]}' differ; prepare it with --size PIXELS."
        )
    try:
        examples = source.__getitems__([int(i) for i in indices])
    except (RuntimeError, ValueError, OSError) as error:  # what array_record, TFDS and Pillow raise
        raise _damaged(info.data_dir, error) from error
    columns = {name: np.stack([example[name] for example in examples]) for name in names}
    return {name: column.astype(_DTYPES.get(column.dtype, column.dtype)) for name, column in columns.items()}


# TFDS's class labels are int64, which JAX would truncate with a warning.
_DTYPES = {np.dtype(np.int64): np.int32, np.dtype(np.float64): np.float32}


def _is_numeric(feature: tfds.features.FeatureConnector) -> bool:
    info = feature.get_tensor_info()  # of a nested feature: a dict
    return isinstance(info, tfds.features.TensorInfo) and np.dtype(info.np_dtype).kind in "biuf"


def arrays(dataset: str, split: str, data_dir: str | None = None) -> dict[str, np.ndarray]:
    """Loads a whole split into memory; takes what `open_source` takes, returns what `read` returns.

    The arrays are read-only: the many places of a config that name one split share them.
    """
    return dict(_decoded(dataset, split, data_folder(data_dir)))


@functools.lru_cache(maxsize=16)
def _decoded(dataset: str, split: str, data_dir: str) -> dict[str, np.ndarray]:
    source = open_source(dataset, split, data_dir)
    starts = range(0, len(source), 1024)  # in parts, so that no list holds every image as an object
    parts = [read(source, range(start, min(start + 1024, len(source)))) for start in starts]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for column in columns.values():
        column.flags.writeable = False
    return columns


def num_classes(dataset: str, data_dir: str | None = None, feature: str = "label") -> int:
    """The number of classes of a data set, as its metadata has it."""
    return open_builder(dataset, data_dir).info.features[feature].num_classes


# --- Writing ---


def generate(builder: tfds.core.DatasetBuilder) -> None:
    """Downloads and writes what `builder` generates, unless it is there already.

    The files appear all at once when they are complete: a process that is killed leaves nothing that
    could be read, and of two that write at the same time one wins.

    Raises:
      UserError: the folder cannot be written, the download fails, or it needs a package that is missing.
    """
    if os.path.isdir(builder.data_dir):
        return
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)  # what lies there is not array_record
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces its steps
            builder.download_and_prepare(download_config=config)
    except ImportError as error:  # many of TFDS's own builders read their files with TensorFlow
        raise UserError(
            f"TFDS needs the package '{error.name}' to make '{builder.name}', once: install it, or give the"
            " files with --source DIR."
        ) from error
    except OSError as error:
        if not os.path.isdir(builder.data_dir):  # otherwise another process was faster
            raise UserError(f"{builder.data_dir}: cannot be prepared ({_reason(error)}).") from error


def tfds_builder(dataset: str, data_dir: str | None = None) -> tfds.core.DatasetBuilder:
    """A builder that TFDS (or, for `digits`, jaxlab) has code for.

    Raises:
      UserError: there is none.
    """
    folder = data_folder(data_dir)
    try:
        with _naming_damage(os.path.join(folder, dataset)):
            if dataset == "digits":
                return digits.Digits(data_dir=folder, file_format="array_record")
            return tfds.builder(dataset, data_dir=folder, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        suggestion = nearest(dataset, tfds.list_builders(with_community_datasets=False))
        raise UserError(
            f"TFDS has no data set '{dataset}'.{suggestion} To make one of files: --source DIR."
        ) from None


class _RawBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes a `RawDataset` under any name."""

    url_infos = None  # nothing to download, so no checksums to look for

    def __init__(
        self,
        name: str,
        version: str,
        features: tfds.features.FeaturesDict,
        splits: Mapping[str, raw.Split],
        data_dir: str,
    ):
        self.name = name
        self.VERSION = tfds.core.Version(version)
        self._features, self._raw_splits = features, splits
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self, features=self._features, supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterable[tuple[int | str, dict[str, Any]]]]:
        return {name: split.examples for name, split in self._raw_splits.items()}

    def _generate_examples(self) -> None:
        raise NotImplementedError  # abstract in TFDS; the splits above are generators already


def raw_builder(
    dataset: str, raw_dataset: raw.RawDataset, data_dir: str | None = None
) -> tfds.core.DatasetBuilder:
    """A builder that stores a raw data set with the features `image`, `label`, `id` and what it has more.

    Where TFDS knows a data set of this name, it gets TFDS's version and class names, so that
    `tfds.data_source` finds it too; its examples come in TFDS's order.

    Raises:
      UserError: not a possible name, or TFDS has another data set of this name.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", dataset) or dataset == "digits":
        raise UserError(f"'{dataset}' cannot be the name of a data set of files; use a-z, 0-9 and _.")
    folder = data_folder(data_dir)
    with _naming_damage(os.path.join(folder, dataset)):
        return _raw_builder(dataset, raw_dataset, folder)


def _raw_builder(dataset: str, raw_dataset: raw.RawDataset, folder: str) -> tfds.core.DatasetBuilder:
    version, classes = "1.0.0", dict(raw_dataset.classes)
    with contextlib.suppress(tfds.core.DatasetNotFoundError):
        published = tfds.builder_cls(dataset)
        features = published(data_dir=folder).info.features
        if published.BUILDER_CONFIGS or not _holds(features, raw_dataset):
            raise UserError(
                f"'{dataset}' is another data set in TFDS, with other images or classes; choose another name."
            )
        version = str(published.VERSION)
        for feature, names in classes.items():
            if all(name.isdecimal() for name in names):  # the files only number them
                classes[feature] = features[feature].names
    features = {
        "image": tfds.features.Image(shape=raw_dataset.image_shape),
        **{feature: tfds.features.ClassLabel(names=names) for feature, names in classes.items()},
        "id": tfds.features.Text(),
    }
    return _RawBuilder(dataset, version, tfds.features.FeaturesDict(features), raw_dataset.splits, folder)


def _holds(features: tfds.features.FeaturesDict, raw_dataset: raw.RawDataset) -> bool:
    """Whether the images and classes of a raw data set can be those of `features`."""
    return (
        "image" in features
        and features["image"].shape == raw_dataset.image_shape
        and all(
            name in features and len(names) <= features[name].num_classes
            for name, names in raw_dataset.classes.items()
        )
    )


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _damaged(path: str, error: Exception) -> UserError:
    return UserError(
        f"{path}: damaged ({_reason(error)}); delete that folder and prepare the data set again."
    )


@contextlib.contextmanager
def _naming_damage(path: str) -> Iterator[None]:
    """Every failure to read the metadata of a data set that is there names its folder."""
    try:
        yield
    except (UserError, ImportError, tfds.core.DatasetNotFoundError):
        raise
    except Exception as error:  # a broken JSON file can fail anywhere in TFDS
        if not os.path.isdir(path):
            raise
        raise _damaged(path, error) from error
