"""The data of the examples: the 8x8 handwritten digits of scikit-learn, in black and white.

Each pixel is binarised once, 1 where its grey value is at least half of the maximum, so that a
bound is on a probability of binary images (Jang et al. train on fixed binarised images, too). The
split is fixed: 1,437 images to train on, 360 to test, the classes equally frequent in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SIDE = 8
PIXELS = SIDE * SIDE
CLASSES = 10

SPLIT_SEED = 0
VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class Digits:
    """Images (images, PIXELS) of 0 and 1, float32, and their labels (images,), int64."""

    x_train: Tensor
    x_test: Tensor
    labels_train: Tensor
    labels_test: Tensor


def load_binary_digits() -> Digits:
    """Returns the images to train on and to test on, with their labels."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).flatten(1)
    binary = (images >= images.max() / 2).float()
    parts = train_test_split(
        binary, digits.target, test_size=0.2, random_state=SPLIT_SEED, stratify=digits.target
    )
    return Digits(*(torch.as_tensor(part) for part in parts))


def validation_split(digits: Digits) -> Digits:
    """Returns a fifth of the training images in the place of the test images.

    What is chosen by their score (a learning rate) has not seen the test images.
    """
    parts = train_test_split(
        digits.x_train,
        digits.labels_train,
        test_size=VALIDATION_SHARE,
        random_state=SPLIT_SEED,
        stratify=digits.labels_train,
    )
    return Digits(*parts)


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yields the positions of `steps` batches: the data in a new order each time they run out.

    What is left of an order and is no whole batch is not used.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(count, generator=generator)
        yield order[:size]
        order = order[size:]


def negative_log_likelihood(pixel_logits: Tensor, x: Tensor) -> Tensor:
    """Returns -log p(x) in nats, summed over the pixels (the last dim); the two broadcast."""
    pixel_logits, x = torch.broadcast_tensors(pixel_logits, x)
    return F.binary_cross_entropy_with_logits(pixel_logits, x, reduction="none").sum(-1)
