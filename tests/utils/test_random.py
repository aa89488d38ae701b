"""Streams of chance never meet, and are the same everywhere."""

from itertools import combinations

import pytest
import torch

from subtuning_lab.utils.random import Stream, seeded


def test_no_two_uses_draw_the_same_numbers():
    keys = [(stream, *key) for stream in Stream for key in [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (3, 4), (3, 4, 0)]]
    draws = {key: torch.rand(4, generator=seeded(*key)) for key in keys}
    assert not [pair for pair in combinations(keys, 2) if torch.equal(draws[pair[0]], draws[pair[1]])]


def test_the_same_key_draws_the_same_numbers_whatever_torch_has_drawn():
    first = torch.rand(3, generator=seeded(Stream.HEAD, 7))
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(3, generator=seeded(Stream.HEAD, 7)))


def test_a_number_is_no_stream():
    with pytest.raises(TypeError, match="stream is 2; it must be a Stream"):
        seeded(2, 7)
