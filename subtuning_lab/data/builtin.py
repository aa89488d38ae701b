"""Tasks that need no file: scikit-learn's digits, and images that are drawn when they are asked for."""

from __future__ import annotations

import numpy as np
import torch

from subtuning_lab.data.splits import SPLIT_SEED, Listing, Part, stratified_choice

DIGITS = {"digits": "10 handwritten digits, real, 32 x 32, 1,000 + 797 (offline)"}
GENERATED = {
    "source": "40 glyph classes of the bundled backbones' pretraining, fresh images, 32 x 32 (offline)",
    "glyphs": "20 glyph classes that the bundled backbones have not seen, 32 x 32 (offline)",
    "count": "how many blobs, 1 to 6, 32 x 32 (offline)",
    "position": "in which of 8 directions a disc lies from a square, 32 x 32 (offline)",
}
_TRAIN_SEED, _TEST_SEED = 1_000_003, 2**32 - 5  # far from the small seeds that pretraining uses; torch takes 32 bits


def digits() -> Listing:
    """scikit-learn's 1,797 handwritten digits at 32 x 32 (bicubic): 1,000 to train on and 797 to test on."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images / 16.0).float()[:, None]  # (n, 1, 8, 8) in [0, 1]
    large = torch.nn.functional.interpolate(small, size=(32, 32), mode="bicubic", align_corners=False).clamp(0, 1)
    images = (large * 255).round().to(torch.uint8).permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()
    classes, labels = tuple(str(digit) for digit in range(10)), bunch.target.astype(np.int64)
    train = stratified_choice(labels, 1000, SPLIT_SEED)
    whole = Part(images, labels)
    return Listing(classes, whole.take(train), whole.take(np.setdiff1d(np.arange(len(labels)), train)))


def generated(kind: str, train_size: int, test_size: int, seed: int) -> Listing:
    """Draw fresh images of one kind; the test images are the same for every seed.

    Args:
        kind: a name in `GENERATED`.
        train_size, test_size: number of images.
        seed: of the training images.
    """
    from subtuning_lab.data.synthetic import KINDS, synthetic_images

    classes, _ = KINDS[kind]
    if train_size < len(classes):
        raise ValueError(
            f"train_size is {train_size}; {kind!r} needs at least one image of each of {len(classes)} classes"
        )
    drawn = (synthetic_images(kind, train_size, _TRAIN_SEED + seed), synthetic_images(kind, test_size, _TEST_SEED))
    train, test = (Part(images.permute(0, 2, 3, 1).numpy(), labels.numpy()) for images, labels in drawn)
    return Listing(classes, train, test)
