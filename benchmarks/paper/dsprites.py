"""dSprites, generated on demand: VTAB's tasks dsprites_loc and dsprites_ori without a download.

The latent factors, their order and VTAB's labels are the published ones: one 64 x 64 black and white image for each of
3 shapes, 6 scales linearly spaced in [0.5, 1], 40 orientations linearly spaced in [0, 2 pi] and 32 x 32 positions
(Matthey et al., dSprites, 2017, https://github.com/deepmind/dsprites-dataset); a label is the index of the factor
divided by (its number of values / 16), rounded down (VTAB, arXiv 1910.04867, task_adaptation/data/dsprites.py). The
program that rendered the original pixels is not published, so the outlines are those of this file: a square, an ellipse
and a heart that stay inside the image at every position and move one pixel per step. An accuracy on these images
belongs to the same task, but to different pixels.
"""

import numpy as np

COUNTS = (3, 6, 40, 32, 32)  # shape, scale, orientation, x, y: the last varies fastest
TOTAL = 737280
SIDE = 64
CLASSES = 16
FACTORS = {"loc": 3, "ori": 2}  # which column of latents() a task predicts

# pixels from the centre to the edge of a square of scale 1: its corners stay inside the image at every position, and no
# edge passes through the centres of pixels at any scale
_HALF = 10.9


def latents(index: np.ndarray) -> np.ndarray:  # [n] -> [n, 5]
    """The indices of the five factors of images 0 to 737279, in the order of the published file."""
    return np.stack(np.unravel_index(index, COUNTS), -1)


def labels(index: np.ndarray, task: str) -> np.ndarray:  # [n] -> [n]
    """VTAB's class, 0 to 15, for the task "loc" (x position) or "ori" (orientation)."""
    column = FACTORS[task]
    return np.floor_divide(latents(index)[..., column], COUNTS[column] / CLASSES).astype(np.int64)


def draw(index: np.ndarray) -> np.ndarray:  # [n] -> [n, 64, 64] uint8
    """Render images with values 0 and 255. A pixel is white if its centre lies inside the shape."""
    shape, scale, turn, x, y = (column[:, None, None] for column in latents(np.asarray(index)).T)
    size = _HALF * np.linspace(0.5, 1.0, COUNTS[1])[scale]
    angle = np.linspace(0.0, 2 * np.pi, COUNTS[2])[turn]
    centres = 0.5 + 16 + np.arange(COUNTS[3])  # in pixels: one per step
    grid = np.arange(SIDE) + 0.5
    right, down = grid[None, None, :] - centres[x], grid[None, :, None] - centres[y]
    a = (np.cos(angle) * right + np.sin(angle) * down) / size
    b = (np.cos(angle) * down - np.sin(angle) * right) / size
    square = np.maximum(np.abs(a), np.abs(b)) <= 1
    ellipse = a**2 + (b / 0.6) ** 2 <= 1
    # the heart curve (u^2 + v^2 - 1)^3 = u^2 v^3, tip down, scaled so that its lobes fit
    u, v = 1.15 * a, 0.1 - 1.15 * b
    heart = (u**2 + v**2 - 1) ** 3 <= u**2 * v**3
    return np.where(np.choose(shape, (square, ellipse, heart)), np.uint8(255), np.uint8(0))


def split(name: str) -> np.ndarray:
    """The indices of the images of "train" (800), "val" (200) or "test" (73 728).

    VTAB takes 80, 10 and 10 % of a shuffled list, and of the first two parts the first 800 and 200. Its order depends
    on the files of another library; this order is that of numpy's PCG64 with seed 0, the same on every machine.
    """
    order = np.random.Generator(np.random.PCG64(0)).permutation(TOTAL)
    parts = {"train": order[:800], "val": order[TOTAL * 8 // 10 :][:200], "test": order[TOTAL * 9 // 10 :]}
    return parts[name]
