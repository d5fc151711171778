"""Convolutional networks for small images."""

from typing import Any

from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from architectures.layers import classifier
from architectures.registry import plain_cfg, register


class CifarResNet(ResNet):
    """timm's ResNet with the stem of the CIFAR networks: 3 × 3 convolution, no max-pooling
    ("Deep Residual Learning", arXiv:1512.03385, section 4.2)."""

    def __init__(self, in_chans: int = 3, **kwargs: Any) -> None:
        super().__init__(in_chans=in_chans, **kwargs)
        self.conv1 = nn.Conv2d(in_chans, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()


class SmallCNN(nn.Module):
    """A feature extractor, then dropout and one linear layer.

    ``features`` takes (B, ``in_chans``, H, W) with H and W of at least 16 to (B, ``num_features``).
    """

    def __init__(
        self, features: nn.Sequential, num_features: int, num_classes: int, drop_rate: float
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = num_features
        self.features = features
        self.head_drop = nn.Dropout(drop_rate)
        self.head = classifier(num_features, num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of the layers from input to output, for layer-wise learning rates."""
        return {"features": r"^features\.(\d+)"}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for ``num_classes``; the pooling can't be changed."""
        if global_pool is not None:
            raise ValueError("the pooling of the small networks is fixed")
        self.num_classes = num_classes
        self.head = classifier(self.num_features, num_classes).to(next(self.parameters()))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images -> (B, classes) logits."""
        return self.forward_head(self.forward_features(x))


def _conv(in_chans: int, out_chans: int, kernel_size: int, pool: bool) -> nn.Sequential:
    """Convolution, batch norm, ReLU and, with ``pool``, max-pooling to half the size."""
    return nn.Sequential(
        nn.Conv2d(in_chans, out_chans, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_chans),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2) if pool else nn.Identity(),
    )


def _simple_cnn(num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0) -> SmallCNN:
    """Six 3 × 3 convolutions and global average pooling, 1.1 M parameters besides the head."""
    features = nn.Sequential(
        _conv(in_chans, 64, 3, pool=False),
        _conv(64, 64, 3, pool=True),
        _conv(64, 128, 3, pool=False),
        _conv(128, 128, 3, pool=True),
        _conv(128, 256, 3, pool=False),
        _conv(256, 256, 3, pool=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return SmallCNN(features, 256, num_classes, drop_rate)


def _modern_lenet(num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0) -> SmallCNN:
    """LeNet-5's layout (LeCun et al. 1998) with batch norm, ReLU and max-pooling, wider."""
    features = nn.Sequential(
        _conv(in_chans, 32, 5, pool=True),
        _conv(32, 64, 5, pool=True),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Sequential(nn.Dropout(drop_rate), nn.Linear(64 * 4 * 4, 120), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Linear(120, 84), nn.ReLU(inplace=True)),
    )
    return SmallCNN(features, 84, num_classes, drop_rate)


def _cifar_resnet(name: str, layers: tuple[int, ...]) -> Any:
    return register(name, CifarResNet, plain_cfg(32, "fc"), block=BasicBlock, layers=layers)


resnet18_cifar = _cifar_resnet("resnet18_cifar", (2, 2, 2, 2))
resnet34_cifar = _cifar_resnet("resnet34_cifar", (3, 4, 6, 3))
simple_cnn = register("simple_cnn", _simple_cnn, plain_cfg(32))
modern_lenet = register("modern_lenet", _modern_lenet, plain_cfg(32))
