"""The other side of corruptions_speed.py: the library imagecorruptions-imaug, image by image, in its own environment.

Reads the path of an array of uint8 images (n, H, W, 3) and a clock from the command line, and from each line of its
input "name severity n"; prints the seconds that the first n images took.
"""

import sys
import time

import imagecorruptions
import numpy as np

images = np.load(sys.argv[1])
clock = {"wall": time.perf_counter, "cpu": time.process_time}[sys.argv[2]]
for line in sys.stdin:
    name, severity, n = line.split()
    imagecorruptions.corrupt(images[0], int(severity), name)  # compiles, loads
    start = clock()
    for image in images[: int(n)]:
        imagecorruptions.corrupt(image, int(severity), name)
    print(clock() - start, flush=True)
