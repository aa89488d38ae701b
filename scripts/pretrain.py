"""Pretrain a bundled backbone on procedurally generated images, and write its weights and its model card.

python scripts/pretrain.py lab-resnet
python scripts/pretrain.py lab-vit --epochs 2 --images 5000 --out weights
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from pretraining_images import SOURCE_CLASSES, SOURCE_FAMILIES, source_images
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Generator, Tensor, nn

from subtuning_lab.data.synthetic import SIDE
from subtuning_lab.nets.cifar_resnet import LAB_MEAN, LAB_STD, lab_resnet, lab_vit
from subtuning_lab.nets.inputs import logits_of

CARD_TEMPLATE = Path(__file__).with_name("model_card_template.md")
WEIGHTS_FOLDER = Path(__file__).resolve().parents[1] / "subtuning_lab" / "nets" / "weights"
ARCHITECTURES = {"lab-resnet": lab_resnet, "lab-vit": lab_vit}
VALIDATION_IMAGES = 5000
RECIPE_OPTIONS = {"epochs": int, "images": int, "lr": float, "precision": str, "seed": int}
PROBE_IMAGES, PROBE_DRAWS = 100, 10
LARGEST_SHIFT = 3  # pixels
INVERTED_FRACTION = 0.3
SEEDS_PER_RUN = 10_000  # seed s draws validation from SEEDS_PER_RUN * s, epoch e from SEEDS_PER_RUN * s + 1 + e


@dataclass(frozen=True)
class PretrainingRecipe:
    """How a backbone is pretrained.

    Args:
        epochs: Passes; each draws fresh images, so that no image is seen twice.
        images: Images per epoch.
        lr: Peak learning rate of OneCycle (linear rise over the first 15 % of the steps, then cosine).
        weight_decay: AdamW's, applied to all parameters.
        batch_size: Images per step.
        clip: Largest norm of the gradient.
        precision: "float32" or "bfloat16" (autocast).
        seed: Decides weights, images, their order and augmentation.
    """

    epochs: int
    images: int
    lr: float
    weight_decay: float = 0.05
    batch_size: int = 128
    clip: float = 1.0
    precision: str = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.epochs < SEEDS_PER_RUN:
            raise ValueError(f"epochs must be between 1 and {SEEDS_PER_RUN - 1}, got {self.epochs}")
        if self.images < self.batch_size:
            raise ValueError(f"images must be at least one batch of {self.batch_size}, got {self.images}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', got {self.precision!r}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")


RECIPES = {
    "lab-resnet": PretrainingRecipe(epochs=14, images=40_000, lr=3e-3),
    "lab-vit": PretrainingRecipe(epochs=14, images=30_000, lr=1.5e-3, batch_size=64),
}


def build_model(name: str, seed: int) -> nn.Module:
    """Return the named network with weights that depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHITECTURES[name](SOURCE_CLASSES)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # the same function; training 64 tokens on a CPU it is nearly twice as fast
    return model


def augment(images: Tensor, generator: Generator) -> Tensor:
    """Shift every uint8 image (batch, 3, 32, 32) by up to 3 pixels, repeating its border, and invert 30 % of them."""
    n, device = len(images), images.device
    shifts = torch.randint(-LARGEST_SHIFT, LARGEST_SHIFT + 1, (2, n, 1), generator=generator)
    inverted = torch.rand(n, 1, 1, 1, generator=generator) < INVERTED_FRACTION
    rows, columns = (torch.arange(SIDE) + shifts).clamp(0, SIDE - 1).to(device)
    image, channel = torch.arange(n, device=device).view(n, 1, 1, 1), torch.arange(3, device=device).view(1, 3, 1, 1)
    shifted = images[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
    return torch.where(inverted.to(device), 255 - shifted, shifted)


def batches(recipe: PretrainingRecipe, epoch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw the images of an epoch; yield augmented, normalized batches and their labels on `device`."""
    seed = SEEDS_PER_RUN * recipe.seed + 1 + epoch
    images, labels = source_images(recipe.images, seed)
    images, labels = images.to(device), labels.to(device)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, recipe.images - recipe.batch_size + 1, recipe.batch_size):
        rows = slice(start, start + recipe.batch_size)
        yield normalized(augment(images[rows], generator)), labels[rows]


def train(model: nn.Module, recipe: PretrainingRecipe, device: torch.device) -> None:
    """Train `model` in place with AdamW and OneCycle; print one line per epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * (recipe.images // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps, pct_start=0.15)
    validation = source_images(1000, SEEDS_PER_RUN * recipe.seed)
    started = time.perf_counter()
    for epoch in range(recipe.epochs):
        losses = []
        for images, labels in batches(recipe, epoch, device):
            losses.append(training_step(model.train(), optimizer, recipe, images, labels))
            schedule.step()
        loss, reached = torch.stack(losses).mean().item(), hits(model, *validation, device).mean().item()
        seconds = time.perf_counter() - started
        progress = f"epoch {epoch + 1}/{recipe.epochs}: loss {loss:.3f}, accuracy {reached:.3f}, {seconds:.0f} s"
        print(progress, flush=True)


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, recipe: PretrainingRecipe, images: Tensor, labels: Tensor
) -> Tensor:
    """Take one step on a batch, in place; return its loss."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        loss = F.cross_entropy(model(images).float(), labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    return loss.detach()


def normalized(images: Tensor) -> Tensor:
    """Float images (batch, 3, 32, 32) in [-1, 1] from uint8 ones: what both bundled backbones expect."""
    mean, std = (images.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (LAB_MEAN, LAB_STD))
    return (images.float() / 255 - mean) / std


def predict(model: Callable[[Tensor], Tensor], images: Tensor, device: torch.device) -> Tensor:
    """Apply `model` to uint8 images (n, 3, 32, 32) in batches of 500; the result lies on the CPU."""
    return logits_of(lambda chunk: model(normalized(chunk)), images, 500, device)


def hits(model: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> Tensor:
    """Return 1.0 where the largest logit is the label's, else 0.0, (n,); the model is in eval mode after."""
    return predict(model.eval(), images, device).argmax(dim=1).eq(labels).float()


def digits_probe(model: nn.Module, device: torch.device) -> tuple[float, float]:
    """Return mean and std of linear probing on handwritten digits: random training sets of 100, tested on the rest."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8)
    images = F.interpolate(images, size=(32, 32), mode="bicubic", align_corners=False).clamp(0, 1).mul(255).round()
    images, model = images.to(torch.uint8).expand(-1, 3, -1, -1), model.eval()
    features = predict(lambda x: model.forward_head(model.forward_features(x), pre_logits=True), images, device)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    splits = StratifiedShuffleSplit(PROBE_DRAWS, train_size=PROBE_IMAGES, random_state=0)
    scores = cross_val_score(probe, features.numpy(), digits.target, cv=splits)
    return scores.mean().item(), scores.std(ddof=1).item()


@dataclass(frozen=True)
class PretrainingResult:
    """What a run reached: accuracies in [0, 1], the wall-clock seconds of training, and where it ran."""

    source_accuracy: float
    family_accuracy: dict[str, float]
    digits: tuple[float, float]
    digits_untrained: tuple[float, float]
    seconds: float
    machine: str


def family_accuracies(right: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the accuracy within each of the four source families, from the hits (n,) of all images."""
    ends = torch.tensor(list(SOURCE_FAMILIES.values())).cumsum(dim=0)
    family = torch.bucketize(labels, ends, right=True)
    return {name: right[family == i].mean().item() for i, name in enumerate(SOURCE_FAMILIES)}


def pretrain(name: str, recipe: PretrainingRecipe, device: torch.device) -> tuple[nn.Module, PretrainingResult]:
    """Train the named backbone from scratch and measure it on images that it has not seen."""
    model = build_model(name, recipe.seed).to(device)
    untrained = digits_probe(model, device)
    started = time.perf_counter()
    train(model, recipe, device)
    seconds = time.perf_counter() - started
    images, labels = source_images(VALIDATION_IMAGES, SEEDS_PER_RUN * recipe.seed)
    right = hits(model, images, labels, device)
    cpu = f"{torch.get_num_threads()} threads on {os.cpu_count()} CPU cores"
    result = PretrainingResult(
        source_accuracy=right.mean().item(),
        family_accuracy=family_accuracies(right, labels),
        digits=digits_probe(model, device),
        digits_untrained=untrained,
        seconds=seconds,
        machine=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
    )
    return model, result


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then move it there, so that `path` is never half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.chmod(0o644)  # safetensors makes files that only their owner can read
    os.replace(partial, path)


def save_weights(model: nn.Module, path: Path, name: str, result: PretrainingResult) -> None:
    """Write the state dict, readout included, as safetensors with a header that says how to use it."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    header = {
        "architecture": name,
        "classes": str(SOURCE_CLASSES),
        "mean": json.dumps(LAB_MEAN),
        "std": json.dumps(LAB_STD),
        "source_accuracy": f"{result.source_accuracy:.4f}",
    }
    write_atomically(path, lambda partial: save_file(state, partial, metadata=header))


DESCRIPTIONS = {
    "lab-resnet": "A CIFAR ResNet of depth 20 with a stride-2 stem and 1 x 1 projection shortcuts.",
    "lab-vit": "A vision transformer (timm's class): patch 4, width 96, 6 blocks, 3 heads, mean of the patch tokens.",
}


def model_card(name: str, model: nn.Module, recipe: PretrainingRecipe, result: PretrainingResult, command: str) -> str:
    """Return the card in Markdown, every figure in it taken from the run."""
    families = (f"| of these: {family} | {value:.3f} |" for family, value in result.family_accuracy.items())
    return CARD_TEMPLATE.read_text(encoding="utf-8").format(
        name=name,
        architecture=DESCRIPTIONS[name],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        mean=LAB_MEAN,
        std=LAB_STD,
        shift=LARGEST_SHIFT,
        inverted=INVERTED_FRACTION,
        seconds=result.seconds,
        machine=result.machine,
        torch=torch.__version__,
        command=command,
        n=VALIDATION_IMAGES,
        source=result.source_accuracy,
        families="\n".join(families),
        digits=result.digits,
        untrained=result.digits_untrained,
        probe_images=PROBE_IMAGES,
        probe_draws=PROBE_DRAWS,
        **SOURCE_FAMILIES,
        **asdict(recipe),
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(ARCHITECTURES), help="which backbone")
    for option, convert in RECIPE_OPTIONS.items():
        parser.add_argument(f"--{option}", type=convert, help="default: the bundled recipe's")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--out", type=Path, default=WEIGHTS_FOLDER, help="folder to write to")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Pretrain, then write `<name>.safetensors` and `<name>.md`."""
    options = parse_arguments(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    changes = {name: getattr(options, name) for name in RECIPE_OPTIONS if getattr(options, name) is not None}
    recipe = replace(RECIPES[options.name], **changes)
    model, result = pretrain(options.name, recipe, options.device)
    command = shlex.join(["python", "scripts/pretrain.py", *(sys.argv[1:] if arguments is None else arguments)])
    card = model_card(options.name, model, recipe, result, command)
    weights = options.out / f"{options.name}.safetensors"
    save_weights(model, weights, options.name, result)
    write_atomically(weights.with_suffix(".md"), lambda partial: partial.write_text(card, encoding="utf-8"))
    print(f"source accuracy {result.source_accuracy:.4f}, digits {result.digits[0]:.3f}")
    print(f"wrote {weights} and {weights.with_suffix('.md')}")


if __name__ == "__main__":
    main()
