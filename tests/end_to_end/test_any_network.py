"""What holds for every chain holds for those that were cut out of other people's networks: one small member of each."""

import copy

import pytest
import torch

import subtuning_lab as lab
from tests.helpers import randomize_norms, tiny_split
from tests.nets.test_cut import made

CNN = {"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}}
SIDE_32 = {"img_size": 32}
SMALL_VIT = SIDE_32 | {"embed_dim": 24, "depth": 3, "num_heads": 2}
NARROW = CNN | {"depths": (1, 1, 1, 1)}
# case -> name, options, side of the images
NETWORKS = {
    "byobnet": ("test_byobnet", CNN, 64),
    "normalizer-free": ("test_nfnet", CNN, 64),
    "dense blocks": ("densenet121", CNN | {"growth_rate": 4}, 64),
    "mixer": ("mixer_s16_224", SIDE_32, 32),
    "pooling": ("poolformer_s12", CNN, 64),
    "ghosts": ("ghostnet_050", CNN, 64),
    "torchvision mobile": ("torchvision:mobilenet_v3_small", {}, 64),
    "rotary positions": ("eva02_tiny_patch14_224", SMALL_VIT | {"patch_size": 8}, 32),
    "relative positions": ("beit_base_patch16_224", SMALL_VIT | {"patch_size": 8}, 32),
    "class attention": ("cait_xxs24_224", SMALL_VIT | {"patch_size": 8}, 32),
    "height and width": ("xcit_nano_12_p16_224", SIDE_32 | {"embed_dim": 32, "depth": 3, "num_heads": 2}, 32),
    "pyramid": ("pvt_v2_b0", NARROW | {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)}, 64),
    "one width": ("test_mambaout", CNN, 64),
    "torchvision shuffles": ("torchvision:shufflenet_v2_x0_5", {}, 64),
    "torchvision squeezes": ("torchvision:squeezenet1_1", {}, 64),
    "own stages": ("stages", None, 16),
    "own tokens": ("tokens", None, 16),
}  # fmt: skip


def network(case):
    name, options, side = NETWORKS[case]
    chain = made(name)[1] if options is None else lab.load_backbone(name, weights="random", **options)
    randomize_norms(chain)
    return lab.set_trainable(chain, []).double(), side


def agree(ours, theirs, tolerance=1e-9):
    return float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max().clamp(1))


@pytest.mark.slow
@pytest.mark.parametrize("case", NETWORKS)
def test_what_holds_for_every_chain(case, tmp_path):
    chain, side = network(case)
    before = {key: value.clone() for key, value in chain.state_dict().items()}
    names, train = chain.block_names, tiny_split(8, side=side)
    subsets = [[], [names[0]], [names[len(names) // 2], names[-1]], ["stem", "tail"]]
    recipe = lab.Recipe(epochs=1, batch_size=4, lr=1e-3, bn="frozen")
    passed, alone = (
        lab.fit_together(chain, subsets, train, recipe, num_classes=3, engine=engine, fold=False)
        for engine in ("one_pass", "sequential")
    )
    for key, value in chain.state_dict().items():  # frozen is frozen
        assert torch.equal(value, before[key]), key
    for ours, theirs in zip(passed, alone, strict=True):  # one pass equals sequential
        assert agree(ours.losses, theirs.losses)
        for part, weights in theirs.weights.items():
            for key, value in weights.items():
                assert agree(ours.weights[part][key], value), (part, key)
    tasks = {f"task{i}": task_of(chain, fit, side) for i, fit in enumerate(alone)}
    images = torch.rand(3, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        separate = {name: task.network()(images) for name, task in tasks.items()}
        merged = lab.merge_tasks(chain, tasks, keep_original=False)
        for name, logits in merged(images).items():  # merging equals separate
            assert agree(logits, separate[name]), name
        for name, task in tasks.items():  # files
            again = lab.load_tuned(task.save(tmp_path / f"{name}.safetensors"), chain)
            assert torch.equal(again.network()(images), separate[name])
    check_export(chain, tasks["task2"], images, tmp_path / "net.pt2")
    check_pruning(chain, tasks["task2"], images)


def task_of(chain, fit, side):
    weights = {part: {key: value.clone() for key, value in own.items()} for part, own in fit.weights.items()}
    return lab.TunedTask(chain, fit.blocks, weights, tuple("abc"), image_size=side)


def check_export(chain, task, images, path):
    """A file that gives the same, or a refusal that says so."""
    with torch.no_grad():
        net = lab.merge_tasks(chain, {"it": task}, keep_original=False)
        lab.export_merged(net, path, image_size=images.shape[-1], dtype=torch.float64)
        exported = torch.export.load(path).module()
        assert agree(exported(images)["it"], net(images)["it"])


def check_pruning(chain, task, images):
    """Fewer weights and the same shape of logits, or a refusal."""
    try:
        pruned = lab.prune_blocks(task, 0.5)
    except ValueError as error:
        assert "nothing to prune" in str(error)
        return
    with torch.no_grad():
        logits = pruned.network()(images)
    assert logits.shape == (3, 3) and logits.isfinite().all()
    assert sum(p.numel() for p in pruned.network().parameters()) < sum(p.numel() for p in task.network().parameters())
    assert copy.deepcopy(pruned).network()(images).equal(logits)
