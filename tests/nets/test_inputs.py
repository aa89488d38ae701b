"""One way from images to logits and to accuracy."""

import math
import warnings

import pytest
import torch
from torch import nn

from subtuning_lab.nets.inputs import accuracy_of, check_images, logits_of, network_input
from subtuning_lab.nets.registry import load_backbone
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


def test_what_does_not_fit_is_said_before_any_training(chain):
    images = tiny_split(2).images
    check_images(chain, images)
    check_images(chain.half(), images)
    for part in chain.float().parts:
        part.half()
    with pytest.raises(ValueError, match=r"stem is torch.float16, .* is torch.float32; convert the chain as a whole"):
        check_images(chain, images)
    chain.float().num_features = 5
    with pytest.raises(ValueError, match=r"features of shape \(2, 6\) .*\(2, 5\)"):
        check_images(chain, images)
    vit = load_backbone("vit_tiny_patch16_224", "random", img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1)
    check_images(vit, images, 16)
    with pytest.raises(ValueError, match=r"images of 8 pixels .*Recipe\(image_size=16\).*img_size=8 or dynamic_img_"):
        check_images(vit, images)
    vit.num_features = 5
    vit.tail = torch.nn.Linear(9, 5)  # no size would help
    with pytest.raises(ValueError, match="can't take images of 16 pixels") as raised:
        check_images(vit, images, 16)
    assert "image_size" not in str(raised.value)


def test_the_cost_of_large_images_is_said_unless_their_size_was_asked_for():
    chain = tiny_chain()
    large = torch.zeros(1, 3, 24, 24, dtype=torch.uint8)
    with pytest.warns(UserWarning, match="tiny was made for 8 pixels and gets 24: about 9 times the work"):
        check_images(chain, large)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_images(chain, large, 24)
        check_images(chain, large[..., :11, :11])
