"""training/positive_weights.py: the factors of --pos-weight."""

import numpy as np
import pytest
import torch

from errors import OptionError
from pipeline.dataset import ImageDataset
from pipeline.sources.base import ArraySource
from training.positive_weights import positive_weights

TARGETS = np.array([[1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1]])
IMAGES = ImageDataset(ArraySource(np.zeros((4, 4, 4), np.uint8), TARGETS, list("abcd"), "arrays"))


def test_numbers_and_counts():
    assert positive_weights("", IMAGES) is positive_weights("none", IMAGES) is None
    assert positive_weights("2.5", IMAGES).tolist() == [2.5] * 4
    # 2 : 2, 3 : 1, no image, and no image without: as of one in all.
    torch.testing.assert_close(
        positive_weights("balanced", IMAGES), torch.tensor([1.0, 3.0, 1.0, 0.25])
    )


def test_a_file_names_each_class(tmp_path):
    path = tmp_path / "weights.txt"
    path.write_text("a 1\nb 2\nc 3\nd 4\n")
    assert positive_weights(str(path), IMAGES).tolist() == [1, 2, 3, 4]
    path.write_text("a 1\nx 2\n")
    with pytest.raises(OptionError, match="--pos-weight: .* no class is called 'x'"):
        positive_weights(str(path), IMAGES)
