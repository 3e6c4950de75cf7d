import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.data.pooling import mean_pool


def test_squares_are_averaged():
    image = np.arange(2 * 4 * 6, dtype=np.uint8).reshape(2, 4, 6, 1)
    pooled = mean_pool({"image": image, "label": [0, 1]}, pool=2)
    assert pooled["image"].dtype == np.float32
    assert pooled["image"].shape == (2, 2, 3, 1)
    assert pooled["image"][0, 0, 0, 0] == (0 + 1 + 6 + 7) / 4
    assert pooled["label"] == [0, 1]
    with pytest.raises(UserError, match="must divide 4 × 6"):
        mean_pool({"image": image}, pool=4)
