"""One way from images to logits and to accuracy."""

import math

import torch
from torch import nn

from subtuning_lab.nets.inputs import accuracy_of, logits_of, network_input
from tests.helpers import tiny_chain, tiny_split


def test_bytes_and_floats_become_the_same_input_whatever_the_precision(chain):
    images = tiny_split(4).images
    mean, std = chain.mean.double(), chain.std.double()
    for dtype in (torch.float32, torch.float64):
        x = network_input(tiny_chain(dtype=dtype), images)
        assert x.dtype == dtype and torch.allclose(x.double(), (images.double() / 255 - mean) / std, atol=1e-5)
        assert torch.equal(x, network_input(tiny_chain(dtype=dtype), images.to(dtype) / 255))
    assert network_input(chain, images, 16).shape == (4, 3, 16, 16)


class Streamed:
    """Images that are read as they are asked for."""

    def __init__(self, images: torch.Tensor):
        self.images, self.device, self.asked = images, images.device, []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        self.asked.append(len(rows))
        return self.images[rows]


def test_logits_come_in_batches_and_in_order():
    images = torch.rand(7, 3, 2, 2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    streamed = Streamed(images)
    logits = logits_of(network, streamed, batch_size=3)
    assert streamed.asked == [3, 3, 1] and not logits.requires_grad
    assert torch.allclose(logits, network(images))
    assert torch.equal(logits_of(lambda x: x.sum((1, 2, 3)), images, device="cpu"), images.sum((1, 2, 3)))


def test_accuracy_by_hand_and_none_for_a_diverged_network():
    logits, labels = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [0.0, 5.0]]), torch.tensor([0, 0, 0, 1])
    assert accuracy_of(logits, labels) == 0.75
    for wrong in (math.nan, math.inf, -math.inf):
        assert math.isnan(
            accuracy_of(logits.index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(wrong)), labels)
        )
