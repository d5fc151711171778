"""Images with known pixels for the tests of augmentation."""

import numpy as np
import torch
from PIL import Image

from augmentation.batch import BatchAugment
from augmentation.preprocessing import Preprocessing
from config import AugmentOptions

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PREPROCESSING = Preprocessing(64, 0.875, "bicubic", MEAN, STD)

PLAIN = AugmentOptions(aa=None, color_jitter=None, hflip=0.0, reprob=0.0)

SAMPLES = 6000  # images whose draws are compared


# How improbable a difference must be before it counts; each comparison has a fixed seed.
LEVEL = 1e-3


def pixels(height=60, width=48, seed=0):
    """Smooth patches with noise over them, (H, W, 3) uint8."""
    rng = np.random.RandomState(seed)
    coarse = Image.fromarray(rng.randint(0, 256, (6, 5, 3), dtype=np.uint8))
    smooth = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=int)
    return np.clip(smooth + rng.randint(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


def batch(count=3, **size):
    arrays = [pixels(seed=i, **size) for i in range(count)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def augment(options=PLAIN, preprocessing=PREPROCESSING, seed=0):
    return BatchAugment(preprocessing, options, seed)
