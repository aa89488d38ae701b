"""Training of subsets: the loss is the textbook's, steps are reported, and a run can be stopped."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from subtuning_lab import Chain, Recipe, Split, Study, set_trainable
from subtuning_lab.data.images import StreamedImages
from subtuning_lab.engine.fit import ENGINES, fit_together
from subtuning_lab.engine.optim import lr_factor
from tests.helpers import tiny_chain, tiny_split, tiny_task

RECIPE = Recipe(epochs=3, batch_size=6, lr=1e-2, head_lr=0.1, weight_decay=0.2)
TRAIN, VALIDATION = tiny_split(18), tiny_split(7, seed=5)


def fit(subsets, recipe=RECIPE, **options):
    return fit_together(tiny_chain(dtype=torch.float64), subsets, TRAIN, recipe, **{"num_classes": 3} | options)


@pytest.mark.parametrize("engine", ENGINES)
def test_linear_probing_is_adamw_on_frozen_features(engine):
    """One batch an epoch, so the order of images doesn't matter; the readout's start follows from its end."""
    recipe = Recipe(epochs=1, batch_size=18, lr=1e-2, weight_decay=0.3)
    chain = tiny_chain(dtype=torch.float64)
    with torch.no_grad():
        features = chain(chain.normalize(TRAIN.images))
    fits = [fit([()], Recipe(**recipe.as_dict() | {"epochs": n}), engine=engine)[0] for n in (1, 4)]
    start = fit([()], Recipe(epochs=1, batch_size=18, lr=1e-300, weight_decay=0), engine=engine)[0].weights["head"]
    for n, fitted in zip((1, 4), fits, strict=True):
        head = torch.nn.Linear(6, 3).double()
        head.load_state_dict(start)
        optimizer = torch.optim.AdamW(head.parameters(), lr=1.0, weight_decay=0.3)
        for step in range(n):
            optimizer.param_groups[0]["lr"] = 1e-2 * lr_factor(step, n, 0.1)
            optimizer.zero_grad()
            loss = F.cross_entropy(head(features), TRAIN.labels)
            assert loss.item() == pytest.approx(float(fitted.losses[step]), abs=1e-9)
            loss.backward()
            optimizer.step()
        assert torch.allclose(head.weight, fitted.weights["head"]["weight"], atol=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_scores_are_those_of_the_weights_that_are_returned(engine):
    for fitted in fit([(), ("block2",), "all"], validation=VALIDATION, engine=engine):
        chain = set_trainable(tiny_chain(dtype=torch.float64), [])
        for name in fitted.blocks:
            chain.part(name).load_state_dict(fitted.weights[name])
        with torch.no_grad():
            features = chain.eval()(chain.normalize(VALIDATION.images))
        logits = features @ fitted.weights["head"]["weight"].T + fitted.weights["head"]["bias"]
        assert fitted.accuracy == pytest.approx(float((logits.argmax(1) == VALIDATION.labels).double().mean()))
        assert fitted.validation_loss == pytest.approx(float(F.cross_entropy(logits, VALIDATION.labels)))


def test_label_smoothing_is_used_in_training_only():
    plain, smooth = (
        fit([()], Recipe(epochs=1, batch_size=18, lr=1e-300, weight_decay=0, label_smoothing=s), validation=VALIDATION)[
            0
        ]
        for s in (0.0, 0.4)
    )
    assert plain.losses[0] != smooth.losses[0]
    assert plain.validation_loss == pytest.approx(smooth.validation_loss)


@pytest.mark.parametrize("engine", ENGINES)
def test_balanced_accuracy_is_scikit_learns(engine):
    validation = Split(VALIDATION.images, torch.tensor([0, 0, 0, 0, 2, 2, 0]))  # uneven, and nothing of class 1
    (fitted,) = fit([("block2",)], validation=validation, engine=engine)
    chain = set_trainable(tiny_chain(dtype=torch.float64), [])
    chain.part("block2").load_state_dict(fitted.weights["block2"])
    head = fitted.weights["head"]
    predicted = (chain.eval()(chain.normalize(validation.images)) @ head["weight"].T + head["bias"]).argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that occur among the predictions alone
        assert fitted.balanced_accuracy == pytest.approx(balanced_accuracy_score(validation.labels, predicted))


@pytest.mark.parametrize("engine", ENGINES)
def test_class_weights_are_scikit_learns(engine):
    """The first loss, of all images in one batch, by hand; and a neighbour without weights is left alone."""
    uneven = Split(TRAIN.images, torch.tensor([0] * 12 + [3] * 6))  # of 4 classes, 2 of which have images
    still = Recipe(epochs=1, batch_size=18, lr=1e-300, weight_decay=0, label_smoothing=0.1)
    recipes = [still, Recipe(**still.as_dict() | {"class_weights": "balanced"})]
    chain = tiny_chain(dtype=torch.float64)
    plain, weighted = fit_together(chain, [(), ()], uneven, recipes, num_classes=4, engine=engine)
    weights = compute_class_weight("balanced", classes=np.array([0, 3]), y=uneven.labels.numpy())
    head = plain.weights["head"]
    with torch.no_grad():
        logits = chain(chain.normalize(uneven.images)) @ head["weight"].T + head["bias"]
        losses = F.cross_entropy(logits, uneven.labels, label_smoothing=0.1, reduction="none")
    assert plain.losses[0].item() == pytest.approx(losses.mean().item(), abs=1e-9)
    by_image = torch.from_numpy(weights)[(uneven.labels == 3).long()]
    assert weighted.losses[0].item() == pytest.approx((by_image * losses).mean().item(), abs=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("patience", [None, 5])
def test_a_candidate_that_diverges_is_marked_and_leaves_the_others_their_bits(engine, patience):
    """Logits that are no numbers would score as class 0, which here is the majority."""
    common = {"validation": Split(VALIDATION.images, torch.tensor([0] * 6 + [1])), "engine": engine}
    recipe = Recipe(**RECIPE.as_dict() | {"patience": patience})
    wild, tame = (Recipe(**recipe.as_dict() | {"lr": lr, "head_lr": lr}) for lr in (1e250, 1e-2))
    fits = fit([("block1",), ("block1",), ()], [wild, tame, tame], **common)
    assert [one.diverged for one in fits] == [True, False, False]
    assert (fits[0].accuracy, fits[0].balanced_accuracy, fits[0].validation_loss) == (0, 0, math.inf)
    for one, other in zip(fits[1:], fit([("block1",), ("block1",), ()], tame, **common)[1:], strict=True):
        assert torch.equal(one.losses, other.losses) and one.accuracy == other.accuracy
        assert all(torch.equal(t, other.weights[p][k]) for p, own in one.weights.items() for k, t in own.items())
    alone = fit([("block1",)], wild, engine=engine)[0] if patience is None else fits[0]
    assert alone.diverged and (patience is not None or alone.accuracy is None)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("moment", ["the last step", "validation"])
def test_divergence_that_no_training_loss_shows(moment, engine):
    class Fragile(torch.nn.Identity):
        def forward(self, x):
            if moment == "validation" and not torch.is_grad_enabled() and len(x) == 7:
                return x / 0
            if moment == "the last step" and x.requires_grad:
                x.register_hook(lambda gradient: gradient / 0)
            return x

    plain = tiny_chain()
    chain = Chain(plain.stem, [*plain.blocks, Fragile()], plain.tail, 6)
    recipe = Recipe(epochs=1, batch_size=18)
    for blocks, diverged in ((("block1",), True), ((), moment == "validation")):
        (one,) = fit_together(chain, [blocks], TRAIN, recipe, num_classes=3, validation=VALIDATION, engine=engine)
        assert one.losses.isfinite().all() and one.diverged == diverged
        assert (one.accuracy == 0 and one.validation_loss == math.inf) == diverged


@pytest.mark.parametrize("engine", ENGINES)
def test_every_step_is_reported_and_passes_arrive_as_they_end(engine):
    steps, passes = [], []
    fits = fit([(), ("block1",), "all"], engine=engine, on_step=steps.append, on_pass=passes.append, memory_limit=1)
    assert sum(steps) == 3 * 3 * 3  # subsets, epochs, batches
    assert sorted(place for done in passes for place in done) == [0, 1, 2] and len(passes) >= 2
    assert all(done[place] is fits[place] for done in passes for place in done)
    assert all(len(f.losses) == 9 and f.epochs == 3 and f.seconds > 0 for f in fits)
    assert all(f.accuracy is None and f.validation_loss is None for f in fits)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_callback_can_stop_the_training(engine):
    def stop(trained):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit([("block1",)], engine=engine, on_step=stop)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_callers_chance_is_neither_used_nor_changed(engine):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = fit([("block1",), "all"], engine=engine)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    for a, b in zip(first, fit([("block1",), "all"], engine=engine), strict=True):
        assert torch.equal(a.losses, b.losses)


def test_batches_differ_in_size_by_one_at_most_and_hold_each_image_once():
    """A last batch of one image would leave batch statistics nothing to average."""
    sizes = []

    class Watching(torch.nn.Identity):
        def forward(self, x):
            if self.training and torch.is_grad_enabled():  # and not while it is examined
                sizes.append(len(x))
            return x

    chain = tiny_chain()
    chain.blocks[0] = Watching()
    fit_together(chain, ["all"], tiny_split(13), Recipe(epochs=1, batch_size=6), num_classes=3, engine="sequential")
    assert sum(sizes) == 13 and len(sizes) == 3 and max(sizes) - min(sizes) <= 1


def test_bf16_keeps_weights_in_full_precision():
    recipe = Recipe(epochs=1, batch_size=6, precision="bf16")
    for engine in ENGINES:
        (fitted,) = fit_together(tiny_chain(), [["block1"]], TRAIN, recipe, num_classes=3, engine=engine)
        assert fitted.losses.isfinite().all()
        assert {t.dtype for t in fitted.weights["block1"].values() if t.is_floating_point()} == {torch.float32}


def test_no_subsets_need_no_training():
    assert fit([]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 2}, r"train label 2 at index 2 is outside 0..1"),
        ({"validation": tiny_split(8, classes=8)}, r"validation label 3 .* outside 0..2"),
        ({"recipe": Recipe(patience=2)}, "patience is 2, but there are no validation images"),
        ({"recipe": [RECIPE] * 2}, "2 recipes for 1 subsets"),
    ],
)
def test_wrong_calls_train_nothing(options, message):
    steps = []
    with pytest.raises(ValueError, match=message):
        fit([("block1",)], options.pop("recipe", RECIPE), on_step=steps.append, **options)
    assert steps == []


def test_streamed_images_train_like_images_in_memory():
    streamed = Split(StreamedImages(TRAIN.images.movedim(1, -1).numpy(), tuple(TRAIN.images.shape[2:])), TRAIN.labels)
    options = {"num_classes": 3, "validation": VALIDATION}
    in_memory = fit_together(tiny_chain(), [(), ("block2",)], TRAIN, RECIPE, **options)
    on_demand = fit_together(tiny_chain(), [(), ("block2",)], streamed, RECIPE, **options)
    for one, other in zip(in_memory, on_demand, strict=True):
        assert torch.equal(one.losses, other.losses) and one.accuracy == other.accuracy


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_study_runs_on_a_gpu(precision):
    recipe = Recipe(epochs=2, batch_size=6, precision=precision)
    study = Study(tiny_chain(), tiny_task(), recipe, folds=2, device="cuda", progress=False)
    assert len(study.scores([(), ("block2",), "all"])) == 6
    assert 0 <= study.test(["block2"]).mean <= 1
    assert study.fit(["block2"]).predict(tiny_task().test.images).isfinite().all()


@pytest.mark.parametrize("engine", ENGINES)
def test_running_statistics_that_are_not_finite_are_a_divergence(engine):
    class Loud(nn.BatchNorm2d):
        def forward(self, x):
            if self.training:
                self.running_var[0] = torch.inf
            return super().forward(x)

    chain = tiny_chain()
    chain.part("block2").bn = Loud(6)
    (one,) = fit_together(
        chain, [("block2",)], tiny_split(), Recipe(epochs=1, batch_size=8), num_classes=3, engine=engine
    )
    assert one.losses.isfinite().all() and one.diverged
