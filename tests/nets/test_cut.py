"""A module of one's own as a chain, by the names of its blocks: the same features and gradients, or why not."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torchvision.ops import MLP

import subtuning_lab as lab
from subtuning_lab.nets.chain import Chain, set_trainable
from tests.helpers import Residual, randomize_norms


class Pyramid(nn.Module):
    """Stages with a convolution between them that belongs to neither, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.early, self.late = nn.ModuleList([Residual(6), Residual(6)]), nn.ModuleList([Residual(8)])
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.early:
            x = block(x)
        x = self.norm(self.down(x).relu_())
        for block in self.late:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class Turning(nn.Module):
    """A block of tokens that takes angles and the grid beside them, by keyword."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), MLP(8, [16, 8])

    def forward(self, x, angles, *, grid):
        return x + self.mlp(self.norm(x) * angles.cos()) / (grid[0] * grid[1])


class Tokens(nn.Module):
    """A transformer with a class token, whose blocks need what is worked out before them from buffers and sizes."""

    def __init__(self):
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.register_buffer("frequencies", torch.rand(8))
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([Turning() for _ in range(3)])})
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.patches(x)
        batch, _, *grid = x.shape
        x = torch.cat([self.token.expand(batch, -1, -1), x.flatten(2).mT], 1)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.frequencies
        for layer in self.encoder["layer"]:
            x = layer(x, angles, grid=grid)
        x = self.norm(x)[:, 1:].mT.reshape(batch, 8, *grid)
        return {"logits": self.head(x.mean((2, 3)))}


def plain():
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
    ]
    return nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Calling(nn.Module):
    """Calls a list of layers in a way of its own."""

    def __init__(self, layers, forward):
        super().__init__()
        self.stem, self.layers = nn.Conv2d(3, 6, 3, 2, 1), nn.ModuleList(layers)
        self.flow, self.pool = forward, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        return self.pool(self.flow(self.stem(x), *self.layers))


def residuals(n=3):
    return [Residual(6) for _ in range(n)]


def straight(x, *layers):
    for layer in layers:
        x = layer(x)
    return x


# model, blocks, features, their names, sizes of images beside 16 x 16
MODULES = {
    "plain layers": (plain, "0", None, ("0.0", "0.4"), [(24, 24), (16, 28)]),
    "stages": (Pyramid, ["early.0", "early.1", "late.0"], "fc", None, [(24, 24), (16, 32), (17, 9)]),
    "tokens": (Tokens, "encoder.layer", "head", ("encoder.layer.0", "encoder.layer.1", "encoder.layer.2"), [(24, 24)]),
    "some blocks": (
        lambda: Calling(residuals(4), straight),
        ["layers.3", "layers.1"],
        None,
        ("layers.1", "layers.3"),
        [],
    ),
}


def made(case):
    new, blocks, features, names, sizes = MODULES[case]
    torch.manual_seed(0)
    model = new().eval()
    randomize_norms(model)
    chain = Chain.from_module(copy.deepcopy(model), blocks, features=features, input_size=(3, 16, 16), name=case)
    return model, chain, names or tuple(blocks), sizes


def features_of(model, case, images):
    """Features by a hook, a way of its own."""
    path, found = MODULES[case][2], []
    if path is None:
        return model(images)
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(images)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("case", MODULES)
def test_the_chain_is_the_module(case):
    model, chain, names, sizes = made(case)
    assert chain.block_names == names
    for size in [(16, 16), *sizes, (16, 16)]:
        images = torch.randn(3, 3, *size)
        with torch.no_grad():
            assert torch.equal(chain(images), features_of(model, case, images)), size
    used = {name for name, _ in model.named_parameters() if not name.startswith(("fc", "head"))}
    assert sum(p.numel() for p in chain.parameters()) == sum(model.get_parameter(name).numel() for name in used)
    buffers = [b for name, b in model.named_buffers() if "frequencies" not in name]
    assert len(dict(chain.named_buffers(remove_duplicate=False))) >= len(buffers)
    assert sum("frequencies" in key for key in chain.state_dict()) == (case == "tokens")


@pytest.mark.parametrize("case", MODULES)
def test_gradients_are_the_modules_in_float64(case):
    model, chain, _, _ = made(case)
    model, chain = model.double(), set_trainable(chain.double(), "all")
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    features_of(model, case, images).square().sum().backward()
    chain(images).square().sum().backward()
    theirs = [p.grad for name, p in model.named_parameters() if not name.startswith(("fc", "head"))]
    own = [p.grad for p in chain.parameters()]
    assert len(own) == len(theirs)
    for gradient in theirs:
        assert any(g.shape == gradient.shape and torch.allclose(g, gradient, 1e-12, 1e-12) for g in own)


@pytest.mark.parametrize("case", MODULES)
def test_a_part_runs_alone(case):
    """In train mode with its own statistics, copied, pickled, and on activations that come from elsewhere."""
    _, chain, _, _ = made(case)
    images, again = torch.randn(2, 3, 16, 16), pickle.loads(pickle.dumps(copy.deepcopy(chain)))
    assert again.fingerprint == chain.fingerprint
    with torch.no_grad():
        x = chain.stem(images)
        assert torch.equal(again(images), chain(images))
        batch = torch.cat([x, x + 1])
        for part in (*chain.blocks, chain.tail):
            batch, x = part(batch.clone()), part(x.clone())
            assert torch.allclose(batch[:2], x, atol=1e-5)
    before = {key: value.clone() for key, value in chain.state_dict().items()}
    last = chain.block_names[-1]
    set_trainable(chain, [last]).train()(torch.randn(4, 3, 16, 16))
    changed = {key for key, value in chain.state_dict().items() if not torch.equal(value, before[key])}
    assert all(key.startswith(f"blocks.{len(chain.blocks) - 1}.") for key in changed)


def u_shaped(x, down, middle, up):
    skip = down(x)
    return up(middle(skip)) * skip


def shared_layers():
    layers = residuals(2)
    layers[1].conv.weight = layers[0].conv.weight
    return layers


class Pair(Residual):
    def forward(self, x):
        return super().forward(x), x


class Turned(Residual):
    def forward(self, x):
        return super().forward(x).transpose(0, 1)


REFUSED = {
    "a skip over blocks": (lambda: Calling(residuals(), u_shaped), "layers", r"layers.1 gives .*a skip leads past"),
    "two tensors": (lambda: Calling([Pair(6)], lambda x, a: a(x)[0]), "layers", r"layers.0 gives a tuple"),
    "shared parameters": (
        lambda: Calling(shared_layers(), straight), "layers", "layers.0 and layers.1 share the parameter",
    ),
    "one block twice": (lambda: Calling(residuals(1), lambda x, a: a(a(x))), "layers", "layers.0 is called 2 times"),
    "a block that is not called": (lambda: Calling(residuals(2), lambda x, a, b: a(x)), "layers", "called 0 times"),
    "batch not first": (
        lambda: Calling([Turned(6)], lambda x, a: a(x).transpose(0, 1)), "layers", "first axis must be the batch"
    ),
    "no such module": (lambda: Calling(residuals(), straight), "encoder", "encoder.*no module of Calling; it has"),
    "a container without blocks": (lambda: Calling(residuals(), straight), "pool", "names no blocks"),
    "features of four axes": (
        lambda: Calling(residuals(), straight), "layers", "features are a tensor of .*batch, num_features",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_chain_is_refused(case):
    new, blocks, message = REFUSED[case]
    features = "pool.0" if case == "features of four axes" else None
    with pytest.raises(ValueError, match=message):
        Chain.from_module(new(), blocks, features=features, input_size=(3, 16, 16))


def test_what_is_asked_for_is_checked():
    with pytest.raises(ValueError, match=r"num_features is 7; those of own are 8"):
        Chain.from_module(Pyramid(), "early", features="fc", num_features=7, input_size=(3, 16, 16), name="own")
    with pytest.raises(ValueError, match="can't take images of 16 x 16"):
        Chain.from_module(nn.Sequential(nn.Flatten(), nn.Linear(3, 4)), ["1"], input_size=(3, 16, 16))
    with pytest.raises(TypeError, match="blocks"):
        Chain.from_module(Pyramid(), 3)


def test_images_whose_tokens_do_not_tell_their_sides_are_refused():
    _, chain, _, _ = made("tokens")
    with pytest.raises(ValueError, match=r"images are 8 x 32; .*\(16, 16\)"):
        chain(torch.zeros(1, 3, 8, 32))
    with pytest.raises(ValueError, match="no images are known"):
        chain.blocks[0](torch.zeros(1, 4, 8))


def test_a_ghost_of_the_past_is_noticed():
    """A value that reaches a later part where autograd sees none: detached, so that the trace calls it a chain."""

    def forgetful(x, first, second):
        y = first(x)
        return second(y) + x.detach().mean()

    with pytest.raises(ValueError, match="needs what was computed before"):
        Chain.from_module(Calling(residuals(2), forgetful), "layers", input_size=(3, 16, 16))


def test_costs_count_a_part_alone():
    """A convolution from 6 to 8 channels, 3 x 3, on 4 x 4 positions, before the last block of the same kind with 8."""
    _, chain, _, _ = made("stages")
    table = lab.part_table(chain)
    assert table.loc["late.0", "flops"] == 2 * 16 * 9 * (6 * 8 + 8 * 8)
    assert table.loc["stem", "flops"] == 2 * 64 * 9 * 3 * 6
    assert table.loc["tail", "flops"] == 0
