"""A plugin: some images of Fashion-MNIST, and two models that train in seconds.

    python main.py --plugin examples/fashion.py --data-set few_fashion --data-path FOLDER …

Used by configs/fmnist_*.yaml; see docs/finetune.md and docs/extend.md.
"""

from pathlib import Path

from timm.models import generate_default_cfgs
from timm.models.resnet import BasicBlock, ResNet

from architectures.registry import plain_cfg, register
from datasets import ArraySource, read_idx, register_dataset
from models import DistilledVisionTransformer

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
CLASSES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
TRAINING, VALIDATION = 3000, 2000  # images


@register_dataset("few_fashion")
def few_fashion(is_train, options, seed):
    """The first images of each part of the IDX files in ``--data-path``."""
    part, count = ("train", TRAINING) if is_train else ("t10k", VALIDATION)
    folder = Path(options.data_path)
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)[:count]
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1)[:count]
    return ArraySource(images, labels, CLASSES, f"few_fashion {part}")


# What timm knows of the models below.
default_cfgs = generate_default_cfgs(
    {
        "micro_resnet": plain_cfg(28, "fc"),
        "micro_deit_distilled": plain_cfg(28, ("head", "head_dist"), fixed_input_size=True),
    }
)

# A ResNet of four residual blocks, 0.3 M parameters.
micro_resnet = register(
    "micro_resnet",
    ResNet,
    module=__name__,
    block=BasicBlock,
    layers=(1, 1, 1, 1),
    channels=(32, 48, 64, 96),
)

# A DeiT of four blocks on 16 patches of 7 × 7 pixels, 0.2 M parameters.
micro_deit_distilled = register(
    "micro_deit_distilled",
    DistilledVisionTransformer,
    module=__name__,
    patch_size=7,
    embed_dim=64,
    depth=4,
    num_heads=4,
)
