"""Wrong calls that no rule can say, or that meet a file or a network: each names the value, and records nothing."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import subtuning_lab as lab
from subtuning_lab.study.records import RecordsError
from tests.helpers import Residual, tiny_chain, tiny_split, tiny_task

RECIPE = lab.Recipe(epochs=1, batch_size=8)
NAN = float("nan")


class Call:
    """What wrong calls are made of; every study of a call keeps its records in the same store."""

    def __init__(self, path):
        self.path = path / "lab.sqlite"
        self.records = lab.Records(self.path)
        self.chain, self.task = tiny_chain(), tiny_task()

    def study(self, backbone=None, task=None, recipe=RECIPE, **options):
        options = {"folds": 2, "device": "cpu", "progress": False, "records": self.records} | options
        return lab.Study(backbone or self.chain, task or self.task, recipe, **options)

    def fit(self, subsets=((),), train=None, recipe=RECIPE, **options):
        return lab.fit_together(self.chain, subsets, train or self.task.train, recipe, **{"num_classes": 3} | options)

    def missing(self, name):
        return self.path.with_name(name)

    def written(self, name, content):
        path = self.path.with_name(name)
        path.write_bytes(content)
        return path


def images(n=6, side=8, **changes):
    value = torch.rand(n, 3, side, side)
    for place, number in changes.items():
        value[int(place.removeprefix("at"))] = number
    return value


def broken_chain():
    chain = tiny_chain()
    chain.stem[0].weight.data.fill_(NAN)
    return chain


def wrong_width():
    plain = tiny_chain()
    return lab.Chain(plain.stem, list(plain.blocks), plain.tail, 5, name="narrow")


def task_of(labels, **options):
    return lab.Task.from_arrays(images(len(labels)), labels, **options)


# what is wrong: (call, error, pattern of the message)
CALLS = {
    # backbones
    "backbone misspelt": (lambda c: lab.load_backbone("resnt18"), ValueError, "'resnt18'.*resnet18"),
    "backbone is a number": (lambda c: lab.load_backbone(18), TypeError, "name is 18"),
    "depth of no network": (lambda c: lab.load_backbone("cifar_resnet21", weights="random"), ValueError, "21.*6n"),
    "unknown weights tag": (lambda c: lab.load_backbone("resnet18.best"), ValueError, "'resnet18.best'.*a1_in1k"),
    "weights misspelt": (lambda c: lab.load_backbone("cifar_resnet8", "pretrain"), ValueError, '"pretrain".*"random"'),
    "weights missing": (
        lambda c: lab.load_backbone("cifar_resnet8", c.missing("w.safetensors")),
        FileNotFoundError,
        "w.safe",
    ),
    "weights damaged": (
        lambda c: lab.load_backbone("cifar_resnet8", c.written("w.safetensors", b"xx")),
        ValueError,
        "w.safetensors is not a readable",
    ),
    "unknown block dropped": (
        lambda c: lab.load_backbone("cifar_resnet8", "random", drop_blocks=["layer7.0"]),
        ValueError,
        "layer7.0; it has layer1.0",
    ),
    # chains
    "no blocks": (lambda c: lab.Chain(nn.Identity(), [], nn.Identity(), 3), ValueError, "blocks is empty"),
    "reserved name": (
        lambda c: lab.Chain(nn.Identity(), {"stem": nn.ReLU()}, nn.Identity(), 3),
        ValueError,
        "stem is reserved",
    ),
    "no features": (lambda c: lab.Chain(nn.Identity(), [nn.ReLU()], nn.Identity(), 0), ValueError, "num_features is 0"),
    "one block twice": (
        lambda c: lab.Chain(nn.Identity(), [Residual(3)] * 2, nn.Identity(), 3),
        ValueError,
        "block1 and block2",
    ),
    "unknown block": (lambda c: lab.set_trainable(c.chain, ["block9"]), ValueError, "block9; it has stem, block1"),
    "blocks is None": (lambda c: lab.set_trainable(c.chain, None), TypeError, "None"),
    "unknown BatchNorm mode": (
        lambda c: lab.set_trainable(c.chain, [], bn="eval"),
        ValueError,
        "'eval'.*batch, frozen",
    ),
    "counting an unknown block": (lambda c: lab.count_parameters(c.chain, ["b"]), ValueError, "no block b; it has"),
    # tasks
    "unknown task": (lambda c: lab.load_task("digitz"), ValueError, "digitz.*digits"),
    "no folder": (lambda c: lab.load_task(f"folder:{c.missing('none')}"), FileNotFoundError, "none"),
    "unknown corruption": (lambda c: lab.load_task("digits+rain@3"), ValueError, "rain.*gaussian_noise"),
    "severity 6": (lambda c: lab.load_task("digits+gaussian_noise@6"), ValueError, "6"),
    "size as text": (lambda c: lab.load_task("digits", train_size="many"), TypeError, "train_size.*'many'"),
    "fewer images than classes": (lambda c: lab.load_task("digits", train_size=5, progress=False), ValueError, "5"),
    "NaN image": (lambda c: lab.Task.from_arrays(images(at3=NAN), [0, 1] * 3), ValueError, r"images\[3\].*NaN"),
    "images above 1": (lambda c: lab.Task.from_arrays(images(at2=200), [0, 1] * 3), ValueError, r"images\[2\]"),
    "images without height": (lambda c: lab.Task.from_arrays(torch.zeros(6, 3), [0, 1] * 3), ValueError, r"\(6, 3\)"),
    "images of integers": (lambda c: lab.Task.from_arrays(np.zeros((6, 8, 8), int), [0, 1] * 3), TypeError, "int64"),
    "labels short": (lambda c: lab.Task.from_arrays(images(), [0, 1]), ValueError, "6 images but 2 labels"),
    "negative label": (lambda c: task_of([0, 1, -1]), ValueError, "-1 at index 2"),
    "labels are floats": (lambda c: task_of([0.0, 1.0]), TypeError, "float64"),
    "one class": (lambda c: task_of([0, 0]), ValueError, "at least 2 values"),
    "class without images": (lambda c: task_of([0, 2, 2]), ValueError, "'1' has no training images"),
    "split of floats": (lambda c: lab.Split(images(), torch.zeros(6, dtype=torch.int64)), ValueError, "uint8.*float32"),
    # training
    "unknown engine": (lambda c: c.fit(engine="fast"), ValueError, "'fast'.*one_pass, sequential"),
    "recipes for others": (lambda c: c.fit(recipe=[RECIPE] * 3), ValueError, "3 recipes for 1 subsets"),
    "recipes that differ": (
        lambda c: c.fit([(), ()], recipe=[RECIPE, lab.Recipe(epochs=2, batch_size=8)]),
        ValueError,
        "differ in epochs",
    ),
    "too few classes": (lambda c: c.fit(num_classes=2), ValueError, "label 2 .*0..1"),
    "patience without images": (lambda c: c.fit(recipe=lab.Recipe(patience=1)), ValueError, "patience is 1"),
    # studies
    "no folds": (lambda c: c.study(folds=0), ValueError, "folds .*0"),
    "more folds than images": (lambda c: c.study(folds=25), ValueError, "k is 25.*24"),
    "folds as text": (lambda c: c.study(folds="5"), TypeError, "folds .*'5'"),
    "unknown device": (lambda c: c.study(device="gpu"), ValueError, "'gpu'.*cpu"),
    "engine misspelt": (lambda c: c.study(engine="onepass"), ValueError, "'onepass'.*one_pass, sequential"),
    "memory as text": (lambda c: c.study(memory_limit="1GB"), TypeError, "memory_limit .*'1GB'"),
    "records elsewhere": (
        lambda c: c.study(records=c.written("r.txt", b"text " * 300)),
        RecordsError,
        "r.txt is not a records file",
    ),
    "backbone of NaN": (lambda c: c.study(broken_chain()), ValueError, "tiny holds numbers that are not finite"),
    "wrong width": (lambda c: c.study(wrong_width()), ValueError, r"narrow .*\(1, 6\).*\(1, 5\)"),
    "image too small": (
        lambda c: c.study(lab.load_backbone("vit_tiny_patch16_224", "random", img_size=32, depth=1)),
        ValueError,
        r"8 pixels.*Recipe\(image_size=32\)",
    ),
    "score of unknown": (lambda c: c.study().scores([["block9"]]), ValueError, "block9; it has stem"),
    "good and bad subset": (lambda c: c.study().scores([["block1"], ["block9"]]), ValueError, "block9"),
    "fit of unknown": (lambda c: c.study().fit(["head"]), ValueError, "no block head"),
    "fit with seed -1": (lambda c: c.study().fit([], seed=-1), ValueError, "seed .*-1"),
    "test of unknown": (lambda c: c.study().test(["block9"]), ValueError, "block9"),
    # files
    "tuned missing": (
        lambda c: lab.load_tuned(c.missing("t.safetensors"), c.chain),
        FileNotFoundError,
        "t.safetensors",
    ),
    "tuned damaged": (
        lambda c: lab.load_tuned(c.written("t.safetensors", b"\x80\x04."), c.chain),
        ValueError,
        "t.safetensors is not a readable",
    ),
    "row without columns": (lambda c: c.records.put([{"key": "k"}]), ValueError, "accuracy.*missing"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_says_what_is_wrong_and_records_nothing(tmp_path, name):
    call, error, pattern = CALLS[name]
    material = Call(tmp_path)
    with pytest.raises(error) as raised:
        call(material)
    assert type(raised.value) is error or error is not ValueError
    assert re.search(pattern, str(raised.value), re.DOTALL), str(raised.value)
    assert len(material.records.table()) == 0 and material.records.test_uses() == 0


def test_the_material_of_the_wrong_calls_is_right(tmp_path):
    """Else they might fail for another reason than theirs."""
    material = Call(tmp_path)
    assert len(material.study().scores([["block1"]])) == 2
    assert len(material.fit()) == 1 and len(material.records.table()) == 2
    assert lab.Task.from_arrays(images(), [0, 1] * 3).num_classes == 2
    assert len(tiny_split()) == 24
