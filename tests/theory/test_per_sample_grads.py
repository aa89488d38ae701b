"""Gradient features: the same numbers as one backward per image and logit, whatever a part is made of."""

import copy
import threading

import pytest
import torch
from torch import nn

from subtuning_lab import Chain, load_backbone
from subtuning_lab.theory.per_sample_grads import chunk_sizes, gradient_norms
from tests.helpers import readout, tiny_chain

IMAGES = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def by_rows(chain, head, images, labels=None):
    """Squared norms (n, parts) by one backward per image and logit, or per image's loss."""
    chain, head = copy.deepcopy(chain).eval().requires_grad_(), copy.deepcopy(head)
    squared = torch.zeros(len(images), len(chain.parts) + 1, dtype=torch.float64)
    for i, image in enumerate(images):
        logits = head(chain(chain.normalize(image[None])))[0]
        outputs = logits if labels is None else [-logits.log_softmax(0)[labels[i]]]
        for output in outputs:
            for j, part in enumerate([*chain.parts, head]):
                if own := list(part.parameters()):
                    gradients = torch.autograd.grad(output, own, retain_graph=True, materialize_grads=True)
                    squared[i, j] += sum(gradient.square().sum() for gradient in gradients)
    return squared


class Scaled(nn.Module):
    """A parameter of its own, and one module that runs twice."""

    def __init__(self):
        super().__init__()
        self.scale, self.twice = nn.Parameter(torch.rand(6, 1, 1) + 0.5), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return self.scale * self.twice(torch.tanh(self.twice(x)))


class OtherFormula(nn.Conv2d):
    """A convolution by its class, but its weight acts standardized."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Tokens(nn.Module):
    """Places as tokens, sequence first."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x):
        tokens = x.flatten(2).permute(2, 0, 1)
        return x + self.linear(self.norm(tokens)).permute(1, 2, 0).view_as(x)


class InPlace(nn.Module):
    """Writes into its convolution's output, and into its own input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x.mul_(2)).relu_()


KINDS = {
    "strided convolution": lambda: nn.Conv2d(6, 6, 3, stride=2, dilation=2, padding=2),
    "grouped convolution": lambda: nn.Conv2d(6, 6, 3, groups=3),
    "depthwise convolution": lambda: nn.Conv2d(6, 6, (1, 3), groups=6, bias=False),
    "padding by name": lambda: nn.Conv2d(6, 6, 3, padding="same"),
    "circular padding": lambda: nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"),
    "transposed convolution": lambda: nn.ConvTranspose2d(6, 6, 2),
    "group norm": lambda: nn.GroupNorm(2, 6),
    "layer norm": lambda: nn.LayerNorm((6, 4, 4)),
    "weight norm": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 1)),
    "own parameter": Scaled,
    "standardized": lambda: OtherFormula(6, 6, 3),
    "tokens": Tokens,
    "in place": InPlace,
    "no parameters": nn.Tanh,
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_every_kind_of_part_equals_one_backward_per_row(make):
    stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        chain = Chain(stem, [make(), nn.Tanh()], nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 6).double()
    head = readout(6)
    norms = gradient_norms(chain, head, IMAGES)
    assert norms.parts == ("stem", "block1", "block2", "tail", "head")
    assert torch.allclose(norms.squared, by_rows(chain, head, IMAGES), rtol=1e-10, atol=0)
    assert (norms.error == 0).all()


@pytest.mark.parametrize("name", ["lab-resnet", "lab-vit"])
def test_real_backbones_equal_one_backward_per_row(name):
    chain, images = load_backbone(name).double(), torch.arange(2 * 3 * 32 * 32).mul(37).view(2, 3, 32, 32) % 256
    head, images = readout(chain.num_features, 3), images.to(torch.uint8)
    expected = by_rows(chain, head, images)
    assert torch.allclose(gradient_norms(chain, head, images).squared, expected, rtol=1e-10, atol=0)
    single = gradient_norms(chain.float(), head.float(), images).squared
    assert torch.allclose(single, expected, rtol=1e-3)


@pytest.mark.parametrize(("classes", "bias"), [(2, True), (9, True), (9, False)])
def test_more_classes_than_features_and_no_bias(classes, bias):
    chain, head = tiny_chain(dtype=torch.float64), readout(6, classes, bias=bias)
    norms = gradient_norms(chain, head, IMAGES)
    assert torch.allclose(norms.squared, by_rows(chain, head, IMAGES), rtol=1e-10, atol=0)
    nn.init.zeros_(head.weight)
    assert (gradient_norms(chain, head, IMAGES).squared[:, :-1] == 0).all()


def test_gradients_of_the_loss():
    chain, head, labels = tiny_chain(dtype=torch.float64), readout(6), torch.tensor([0, 3, 1, 1, 2])
    norms = gradient_norms(chain, head, IMAGES, method="loss", labels=labels)
    assert torch.allclose(norms.squared, by_rows(chain, head, IMAGES, labels), rtol=1e-10, atol=0)


@pytest.mark.parametrize("method", ["exact", "random"])
def test_chunks_change_nothing(method):
    chain, head = tiny_chain(dtype=torch.float64), readout(6)
    whole = gradient_norms(chain, head, IMAGES, method=method, directions=7)
    for sizes in ({"chunk": 1}, {"chunk": 2, "direction_chunk": 3}, {"direction_chunk": 1}, {"memory_limit": 1}):
        parts = gradient_norms(chain, head, IMAGES, method=method, directions=7, **sizes)
        assert torch.allclose(parts.squared, whole.squared, rtol=1e-10)
        assert torch.allclose(parts.error, whole.error, rtol=1e-8, atol=1e-12)


def test_random_directions_are_unbiased_within_their_standard_error():
    chain, head = tiny_chain(dtype=torch.float64), readout(6, 8)
    exact = gradient_norms(chain, head, IMAGES).squared
    norms = gradient_norms(chain, head, IMAGES, method="random", directions=400, seed=3)
    off, error = (norms.squared - exact)[:, :-1], norms.error[:, :-1]
    assert (error[:, :-1] > 0).all()
    deviations = (off / error).flatten()
    assert deviations.abs().max() < 4 and 0.5 < deviations.square().mean() < 2
    assert torch.allclose(norms.squared[:, -1], exact[:, -1]) and norms.error[:, -1].max() < 1e-10  # ||v|| is fixed
    fewer = gradient_norms(chain, head, IMAGES, method="random", directions=25, seed=3).error[:, :-1]
    assert 2.5 < float(fewer.mean() / error.mean()) < 6  # 4 in expectation
    other = gradient_norms(chain, head, IMAGES, method="random", directions=25, seed=4)
    assert not torch.allclose(other.error[:, :-1], fewer)


def test_a_subset_is_the_sum_of_its_parts():
    norms = gradient_norms(tiny_chain(), readout(6), IMAGES)
    assert torch.equal(norms.of(["block3", "stem"]), norms.squared[:, [0, 3]].sum(1))
    assert torch.equal(norms.of([], head=True), norms.squared[:, -1])
    assert torch.equal(norms.of([]), torch.zeros(5, dtype=torch.float64))
    with pytest.raises(ValueError, match="no block block9; there are stem, block1"):
        norms.of(["block9"])
    with pytest.raises(TypeError, match='blocks is the string "stem"'):
        norms.of("stem")
    table = norms.table()
    assert table.loc["block2", "mean"] == pytest.approx(float(norms.squared[:, 2].mean()))
    assert table["n"].eq(5).all() and table["standard_error"].eq(0).all()


def test_the_backbone_stays_as_it_is_and_statistics_are_kept():
    chain = tiny_chain()
    before, state = chain.fingerprint, chain.train().training
    first = gradient_norms(chain, readout(6).float(), IMAGES).squared
    assert chain.fingerprint == before and chain.training == state
    assert not any(p.requires_grad or p.grad is not None for p in chain.parameters())
    alone = gradient_norms(chain, readout(6).float(), IMAGES[2:3]).squared
    assert torch.allclose(alone[0], first[2], rtol=1e-4)


@pytest.mark.parametrize("method", ["exact", "random"])
def test_threads_change_nothing_and_leave_the_callers_number(method):
    chain, images, threads = tiny_chain(), IMAGES.repeat(8, 1, 1, 1), torch.get_num_threads()
    chain.blocks[1] = Scaled()  # parameters without a formula are put in place for a while
    alone = gradient_norms(chain, readout(6), images, method=method, chunk=40, direction_chunk=2).squared
    try:
        torch.set_num_threads(3)
        together = gradient_norms(chain, readout(6), images, method=method, chunk=2).squared
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(together, alone)


def test_an_error_in_a_thread_is_the_callers():
    class Homely(nn.Module):
        def forward(self, x):
            if threading.current_thread() is not threading.main_thread():
                raise ArithmeticError("not here")
            return x

    chain, before = tiny_chain(), torch.get_num_threads()
    chain.blocks[1] = Homely()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ArithmeticError, match="not here"):
            gradient_norms(chain, readout(6), IMAGES, chunk=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_chunks_fit_the_memory_limit():
    assert chunk_sizes(fixed=10, each=5, directions=4, limit=65) == (2, 4)
    assert chunk_sizes(fixed=10, each=5, directions=100, limit=65) == (1, 11)
    assert chunk_sizes(fixed=10, each=5, directions=4, limit=3) == (1, 1)
    for limit in (100, 1000, 10**6):
        images, directions = chunk_sizes(7, 3, 50, limit)
        assert images * (7 + 3 * directions) <= limit and 1 <= directions <= 50


BAD = {
    "wide head": ({"head": readout(5)}, ValueError, "head takes 5 features, but tiny has 6"),
    "bright images": ({"images": IMAGES.float()}, ValueError, r"images\[0\] has values that are NaN or outside"),
    "no images": ({"images": IMAGES[:0]}, ValueError, "none empty"),
    "no labels": ({"method": "loss"}, ValueError, 'labels are missing for method "loss"'),
    "useless labels": ({"labels": [0] * 5}, ValueError, 'labels are of no use to method "exact"'),
    "few labels": ({"method": "loss", "labels": [0]}, ValueError, "5 images but 1 labels"),
    "strange labels": ({"method": "loss", "labels": [0, 1, 2, 3, 4]}, ValueError, "label 4 at index 4 is outside 0..3"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(change, error, message):
    arguments = {"backbone": tiny_chain(), "head": readout(6), "images": IMAGES} | change
    with pytest.raises(error, match=message):
        gradient_norms(**arguments)


@pytest.mark.parametrize("n", [1, 5])
def test_parts_that_mix_images_are_refused(n):
    chain = tiny_chain()
    chain.blocks[1].bn = nn.BatchNorm2d(6, track_running_stats=False)
    with pytest.raises(ValueError, match="block2 mixes the images of a batch"):
        gradient_norms(chain, readout(6), IMAGES[:n])
