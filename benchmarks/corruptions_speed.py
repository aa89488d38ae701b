"""How fast are the corruptions? Ratios of seconds, measured side by side in one run.

The same images by three ways, in turn; printed are the medians in microseconds per image and their ratios:

    batch     `corrupt` of all images at once
    single    `corrupt` of one image after another
    library   imagecorruptions-imaug 1.1.5, one image after another in one thread, if `--library` names the Python of an
              environment that has it (it needs other packages than ours, so it gets an environment of its own)

All take the parameters of ImageNet-C, the only ones that the library has. Its elastic transform is another one than
the published, and its frost reads photographs, where ours draws ice.

    python benchmarks/corruptions_speed.py --library ~/library/bin/python
    python benchmarks/corruptions_speed.py --images 200 --size 224 --corruption zoom_blur --clock cpu
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import subtuning_lab as lab
from subtuning_lab.data.corruptions import registry as corruptions
from subtuning_lab.data.corruptions.registry import corrupt, corruption_names
from subtuning_lab.report.machine import machine_line

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    """Measures every corruption that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--singles", type=int, default=500, help="images of the way one by one")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--severity", type=int, default=3, choices=corruptions.SEVERITIES)
    parser.add_argument("--corruption", action="append", choices=corruption_names(), help="default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--library", help="a Python that has imagecorruptions-imaug")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where others use the machine too")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    corruptions.LARGEST_SMALL_SIZE = 0
    print(machine_line(), f"threads {torch.get_num_threads()}, {arguments.clock} clock, device {arguments.device}")
    print(
        f"{arguments.images} images of {arguments.size} px, severity {arguments.severity}, {arguments.repeats} repeats"
    )
    images = photographs(arguments.images, arguments.size)
    library = open_library(arguments.library, images, arguments.clock) if arguments.library else None
    print(f"{'microseconds per image':20}{'batch':>9}{'single':>9}{'library':>9}   single/batch  library/batch")
    for name in arguments.corruption or corruption_names():
        measure(name, images.to(arguments.device), arguments, library)
    if library:
        library.stdin.close()
        library.wait()


def photographs(n: int, size: int) -> torch.Tensor:
    """Images (n, 3, size, size) with edges and flat areas, as photographs have them: glyphs over a smooth ground."""
    glyphs = lab.load_task("glyphs", train_size=min(n, 1000), progress=False, image_size=size).train.images
    ramp = torch.linspace(0, 60, size)
    ground = (ramp[:, None] + ramp).to(torch.uint8)
    return (glyphs // 2 + ground).repeat(-(-n // len(glyphs)), 1, 1, 1)[:n]


def open_library(python: str, images: torch.Tensor, clock: str) -> subprocess.Popen:
    """Starts the library on these images; it answers every line on its input with seconds."""
    file = Path(tempfile.mkdtemp()) / "images.npy"
    np.save(file, images.permute(0, 2, 3, 1).numpy())
    worker = Path(__file__).with_name("library_corruptions.py")
    command = [str(Path(python).expanduser()), str(worker), str(file), clock]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)


def measure(name: str, images: torch.Tensor, arguments: argparse.Namespace, library: subprocess.Popen | None) -> None:
    """Runs all ways in turn and prints one row."""
    severity, clock = arguments.severity, CLOCKS[arguments.clock]
    few = images[: arguments.singles]
    corrupt(few[:8], name, severity)  # warm: matrices are made
    seconds: dict[str, list[float]] = {"batch": [], "single": [], "library": []}
    for _ in range(arguments.repeats):
        seconds["batch"].append(timed(lambda: corrupt(images, name, severity), clock) / len(images))
        seconds["single"].append(timed(lambda: [corrupt(one[None], name, severity) for one in few], clock) / len(few))
        if library:
            library.stdin.write(f"{name} {severity} {len(images)}\n")
            seconds["library"].append(float(library.stdout.readline()) / len(images))
    medians = {way: 1e6 * statistics.median(values) for way, values in seconds.items() if values}
    told = f"{name:22}" + "".join(f"{value:9.1f}" for value in medians.values())
    told += "" if library else f"{'-':>9}"
    ratios = [medians[way] / medians["batch"] for way in ("single", "library") if way in medians]
    print(told + "".join(f"{ratio:14.1f}x" for ratio in ratios), flush=True)


def timed(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds that `run` takes."""
    start = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    main()
