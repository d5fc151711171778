"""Convolutional networks for small images."""

from typing import Any

from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices
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
        for info in self.feature_info:
            info["reduction"] //= 2 if info["module"] == "act1" else 4


class SmallCNN(nn.Module):
    """Convolutions, pooling and what follows it, then dropout and one linear layer.

    ``features`` begins with layers made by ``_conv``: (B, ``in_chans``, H, W), H and W of at least
    16, to a map (B, ``num_features``, h, w). The others, from an ``AdaptiveAvgPool2d`` on, make
    (B, ``head_hidden_size``) of it. ``global_pool`` is "avg", or "" to return the map where there
    are no classes. In timm's ``feature_info`` is what each max-pooling gets, and the map.

    Raises:
        ValueError: another ``global_pool``.
    """

    def __init__(
        self,
        features: nn.Sequential,
        head_hidden_size: int,
        num_classes: int,
        in_chans: int,
        drop_rate: float,
        global_pool: str,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.head_hidden_size = head_hidden_size
        self.features = features
        pooling = (i for i, x in enumerate(features) if isinstance(x, nn.AdaptiveAvgPool2d))
        self.num_convs = next(pooling)
        self.feature_info = _feature_info(features[: self.num_convs])
        self.num_features = self.feature_info[-1]["num_chs"]
        self.head_drop = nn.Dropout(drop_rate)
        self._set_classes(num_classes, global_pool)
        self.head = classifier(head_hidden_size, num_classes)

    def _set_classes(self, num_classes: int, global_pool: str) -> None:
        if global_pool not in ("avg", "") or (num_classes > 0 and not global_pool):
            raise ValueError(
                f"the pooling of the small networks is fixed, global_pool {global_pool!r} isn't "
                "possible: use 'avg', or '' without classes"
            )
        self.num_classes = num_classes
        self.global_pool = global_pool

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of the layers from input to output, for layer-wise learning rates."""
        return {"features": r"^features\.(\d+)"}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for ``num_classes``, none for 0, and another ``global_pool`` unless None."""
        self._set_classes(num_classes, self.global_pool if global_pool is None else global_pool)
        head = classifier(self.head_hidden_size, num_classes)
        self.head = head.to(next(self.parameters())).train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps in ``feature_info``, as timm's models answer it.

        ``indices`` are the last so many, those listed, or all (None); with ``stop_early`` nothing
        is computed after the last of them. Returns (what was computed last, list of maps), or the
        list alone. ``norm`` changes nothing. Raises ValueError for an ``output_fmt`` that is not
        "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is NCHW, not {output_fmt}")
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        found: list[Tensor] = []
        for convolution, norm_layer, activation, pool in self.features[: self.num_convs]:
            x = activation(norm_layer(convolution(x)))
            if isinstance(pool, nn.MaxPool2d):
                found.append(x)
                if stop_early and len(found) > last:
                    break
            x = pool(x)
        found.append(x)
        maps = [found[i] for i in wanted]
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what ``forward_intermediates`` with ``indices`` doesn't need; the head goes with
        the layers before it. Returns the indices counted from the first."""
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        shortened = last < len(self.feature_info) - 1
        if shortened or prune_head:
            info = self.feature_info[last]
            self.num_convs = int(info["module"].split(".")[1]) + 1
            self.features = self.features[: self.num_convs]
            if shortened:  # the last of the maps is what this pooling gets
                self.features[-1][-1] = nn.Identity()
            self.num_features = self.head_hidden_size = info["num_chs"]
            self.reset_classifier(0, "")
        return wanted

    def _through(self, x: Tensor, start: int, stop: int) -> Tensor:
        for i, layer in enumerate(self.features):  # TorchScript can't slice it
            if start <= i and i < stop:
                x = layer(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images -> (B, num_features, h, w), before pooling."""
        return self._through(x, 0, self.num_convs)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, num_features, h, w) -> (B, classes) logits, or with ``pre_logits`` what the head
        gets."""
        if self.global_pool == "avg":
            x = self._through(x, self.num_convs, len(self.features))
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


def _feature_info(layers: nn.Sequential) -> list[dict[str, Any]]:
    """timm's description of what each max-pooling gets and of what comes last."""
    info, reduction = [], 1
    for i, (convolution, *_, pool) in enumerate(layers):
        channels = convolution.out_channels
        if isinstance(pool, nn.MaxPool2d):
            info.append({"num_chs": channels, "reduction": reduction, "module": f"features.{i}.2"})
            reduction *= 2
    last = f"features.{len(layers) - 1}.3"
    return [*info, {"num_chs": channels, "reduction": reduction, "module": last}]


def _simple_cnn(
    num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0, global_pool: str = "avg"
) -> SmallCNN:
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
    return SmallCNN(features, 256, num_classes, in_chans, drop_rate, global_pool)


def _modern_lenet(
    num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0, global_pool: str = "avg"
) -> SmallCNN:
    """LeNet-5's layout (LeCun et al. 1998) with batch norm, ReLU and max-pooling, wider."""
    features = nn.Sequential(
        _conv(in_chans, 32, 5, pool=True),
        _conv(32, 64, 5, pool=True),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Sequential(nn.Dropout(drop_rate), nn.Linear(64 * 4 * 4, 120), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Linear(120, 84), nn.ReLU(inplace=True)),
    )
    return SmallCNN(features, 84, num_classes, in_chans, drop_rate, global_pool)


_RESNET = plain_cfg(32, "fc", first_conv="conv1", pool_size=(4, 4))

default_cfgs = generate_default_cfgs(
    {
        "resnet18_cifar": _RESNET,
        "resnet34_cifar": _RESNET,
        "simple_cnn": plain_cfg(32, first_conv="features.0.0", pool_size=(4, 4)),
        "modern_lenet": plain_cfg(32, first_conv="features.0.0", pool_size=(8, 8)),
    }
)


def _cifar_resnet(name: str, layers: tuple[int, ...]) -> Any:
    features = {"out_indices": (0, 1, 2, 3, 4)}
    return register(name, CifarResNet, features=features, block=BasicBlock, layers=layers)


resnet18_cifar = _cifar_resnet("resnet18_cifar", (2, 2, 2, 2))
resnet34_cifar = _cifar_resnet("resnet34_cifar", (3, 4, 6, 3))
simple_cnn = register(
    "simple_cnn", _simple_cnn, features={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
)
modern_lenet = register(
    "modern_lenet", _modern_lenet, features={"out_indices": (0, 1, 2), "feature_cls": "getter"}
)
