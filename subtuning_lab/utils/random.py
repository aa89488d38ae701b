"""Chance: every use of it has a stream of its own, so that no two uses can draw the same numbers."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What random numbers are for. Values are part of what results depend on: add new ones at the end."""

    ORDER = 0  # of training images, (seed, epoch)
    VIEW = 1  # augmented views, (seed, epoch, batch)
    HEAD = 2  # a new readout's weights, (seed,)
    ADAPTER = 3  # an adapter's weights, (seed, part)
    WEIGHTS = 4  # re-initialized weights of a part, (seed, part)
    PRUNING = 5  # channels pruned at random, (seed,)
    SIGNS = 6  # random signs of gradient norms, (seed, image)
    NOISE = 7  # draws of a posterior over weights, (seed, draw)
    SAMPLE = 8  # images that a bound's gradient features are taken on, (seed,)
    PROBE = 9  # examples that a network is examined with, (seed,)
    CRITERION = 10  # labels, blocks and subsets that a score of blocks draws, (seed, ...)


def seeded(stream: Stream, *key: int) -> torch.Generator:
    """A CPU generator for one use of chance and a key such as (seed, epoch); other keys give independent numbers."""
    if not isinstance(stream, Stream):
        raise TypeError(f"stream is {stream!r}; it must be a Stream")
    # SeedSequence takes no notice of trailing zeros, so the key's length goes in as well.
    state = np.random.SeedSequence((len(key), int(stream), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))
