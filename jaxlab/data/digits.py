"""The 1,797 real 8 × 8 digits that scikit-learn carries: the data set that needs no download."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

TRAIN_SIZE = 1200


class Digits(tfds.core.GeneratorBasedBuilder):
    """scikit-learn's digits (UCI "Optical Recognition of Handwritten Digits", its test part).

    `image` is uint8 [8, 8, 1] with the values 0 to 16, `label` 0 to 9, `id` names scikit-learn's row.
    The first 1,200 rows of one fixed random permutation are "train", the other 597 "test".
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing to download, so no checksums to look for

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(8, 8, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
                "id": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        rows = np.random.default_rng(0).permutation(1797)
        return {
            "train": self._generate_examples(rows[:TRAIN_SIZE]),
            "test": self._generate_examples(rows[TRAIN_SIZE:]),
        }

    def _generate_examples(self, rows: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits  # a second to import, needed once per data_dir

        images, labels = load_digits(return_X_y=True)
        for row in rows.tolist():
            # A Pillow image: TFDS would encode an array with TensorFlow.
            image = Image.fromarray(images[row].reshape(8, 8).astype(np.uint8))
            yield row, {"image": image, "label": int(labels[row]), "id": f"digits_{row:04d}"}
