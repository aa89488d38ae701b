"""What the methods of one grid share: computed once for the training images seen last, and gone with the grid."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from subtuning_lab.data.task import Split
from subtuning_lab.study.keys import OtherImages


class Latest:
    """Remembers what was computed for one set of images; another set takes its place."""

    def __init__(self) -> None:
        self._images, self._known = "", {}

    def of(self, train: Split, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What was computed under a key for images and labels of this content: a GPU gets new copies of a split."""
        images = OtherImages(train).fingerprint
        if images != self._images:
            self._images, self._known = images, {}
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]
