"""Show where a model looks: attention of DeiT and CaiT, Grad-CAM of any model, over the image.

Attention shows which patches the answer is read from, whatever the class. Grad-CAM shows what
speaks for one class.
"""

import argparse
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from augmentation.bands import composite
from errors import OptionError, UserError
from inference import Classifier
from outputs.console import say
from pipeline.decoding import BadImageError
from tools.common import command, labels, trained
from tools.common.attention import attention_layers, attention_map, layer_map
from tools.common.page import Page

ABOUT = "the class in question (default: the likeliest; multi-label: each that is there)"
METHODS = ("auto", "rollout", "last", "grad-cam")
SIDE = 224  # pixels of an image on the page, and of one that is drawn at least


def heatmap(
    classifier: Classifier,
    tensor: Tensor,
    class_index: int | None = None,
    method: str = "auto",
    *,
    layer: int | None = None,
    head: int | None = None,
) -> Tensor:
    """Where the model looks on an image. Other threads may use the model meanwhile.

    Args:
        classifier: as of ``inference.load_for_inference``, of a checkpoint.
        tensor: the image as ``classifier.transform`` makes it, (3, H, W).
        class_index: the class in question, None for the likeliest.
        method: "rollout" follows attention through all layers, "last" takes the last layer's,
            "grad-cam" weighs the last feature map by its gradients. "auto" is Grad-CAM where a
            class is asked for, which attention doesn't show, or the model has none; else rollout.
        layer: shows the attention of this one alone, counted from 0, whatever the ``method``.
        head: shows this head of it, counted from 0, None for the mean of all.

    Returns:
        (H, W) float32 in 0..1 on the CPU, 0 everywhere where nothing stands out.

    Raises:
        UserError: the model can't be explained in this way.
    """
    model = classifier.model
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise UserError("only a checkpoint can be explained: an ONNX file hides what is inside")
    if method == "auto":
        attends = class_index is None and bool(attention_layers(model))
        method = "rollout" if attends else "grad-cam"
    images = tensor[None].to(parameter.device)
    if layer is not None:
        grid = layer_map(model, images, layer, head)
    elif method == "grad-cam":
        grid = grad_cam(model, images, class_index)
    else:
        grid = attention_map(model, images, last=method == "last")
    size = tuple(tensor.shape[-2:])
    grid = F.interpolate(grid[None, None].float(), size, mode="bilinear", align_corners=False)
    return _scaled(grid[0, 0]).cpu()


def _scaled(grid: Tensor) -> Tensor:
    """From the least to the greatest value as 0..1."""
    low, high = grid.min(), grid.max()
    return (grid - low) / (high - low) if high - low > 1e-12 else torch.zeros_like(grid)


# --- Grad-CAM -------------------------------------------------------------------------------------


def grad_cam(model: nn.Module, images: Tensor, class_index: int | None = None) -> Tensor:
    """What speaks for a class on one image (1, 3, H, W): (rows, columns), not negative.

    Grad-CAM (arXiv:1610.02391): ReLU(Σₖ αₖ Aₖ), where A is the last feature map before pooling and
    αₖ the mean gradient of the class's logit on its k-th channel. Where attention can be followed,
    A are the patches that go into the last attention, and each has its own gradient for αₖ
    (HiResCAM, arXiv:2011.08891): the class token reads few of them, a mean would blame all. Of
    other transformers with a class token A are the last patches that reach it; those that take the
    mean of their patches are refused.

    Raises UserError for a model in which no such map is found.
    """
    # Frozen weights must not end the graph before the feature map.
    images = images.detach().clone().requires_grad_(True)
    layers, inner = attention_layers(model), [m for m in model.modules() if m is not model]
    with torch.enable_grad():
        if layers:
            with _kept(layers[-1:], lambda inputs, output: inputs[:1]) as found:
                logits = model(images)
        elif hasattr(model, "forward_features") and hasattr(model, "forward_head"):
            logits, found = _from_features(model, inner, images)
        else:
            with _kept(
                inner,
                lambda inputs, output: [output] if _is_map(output, images) else [],
                after=True,
            ) as found:
                logits = model(images)
    index = int(logits[0].argmax()) if class_index is None else class_index
    for features in reversed(found):
        gradient = torch.autograd.grad(
            logits[0, index], features, retain_graph=True, allow_unused=True
        )[0]
        if gradient is None:
            continue
        gradient = _channels_first(gradient, model, images)
        if not layers:
            if features.ndim == 3 and not gradient.any():
                continue  # from here on the class token alone is read
            gradient = gradient.mean((1, 2), keepdim=True)
        return (gradient * _channels_first(features.detach(), model, images)).sum(0).relu()
    raise UserError(f"{type(model).__name__} has no feature map that Grad-CAM could look at")


def _from_features(
    model: nn.Module, inner: Sequence[nn.Module], images: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The logits, and the maps or patches that they come from, in order, by timm's interface.

    A map is what ``forward_features`` returns. Where the answer is read from a class token, it
    comes from patches that went into a norm before, as the sum of all blocks so far.
    """
    inner = [layer for layer in inner if isinstance(layer, nn.LayerNorm)] or inner
    with _kept(
        inner, lambda inputs, output: [x for x in inputs if _is_patches(x, model, images)]
    ) as found:
        features = model.forward_features(images)
    if not isinstance(features, Tensor):
        raise UserError(f"{type(model).__name__} has more than one feature map: Grad-CAM takes one")
    logits = model.forward_head(features)
    with torch.no_grad():
        wanted = model(images)
    if not torch.allclose(wanted, logits, rtol=1e-3, atol=1e-3):
        raise UserError(f"the answer of {type(model).__name__} isn't read from its features alone")
    if features.ndim == 4:
        return logits, [features]
    if _is_patches(features, model, images):
        [gradient] = torch.autograd.grad(logits.square().sum(), features, retain_graph=True)
        if _channels_first(gradient, model, images).any():
            # Attention has spread over all of them what one of them saw.
            raise UserError(
                f"the answer of {type(model).__name__} is the mean of patches that have seen each "
                "other: Grad-CAM doesn't show where it comes from"
            )
    return logits, [x for x in found if x.shape[2] == features.shape[2]]


@contextmanager
def _kept(
    layers: Sequence[nn.Module],
    pick: Callable[[tuple[Any, ...], Any], Iterable[Tensor]],
    *,
    after: bool = False,
) -> Iterator[list[Tensor]]:
    """A list that gets what is to ``pick`` of each layer's inputs, and ``after`` it of its output,
    as the model runs."""
    found: list[Tensor] = []
    caller = threading.get_ident()

    def keep(_: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> None:
        # A server's other threads may be using the same model.
        if threading.get_ident() == caller:
            found.extend(pick(inputs, output))

    hooks = [
        layer.register_forward_hook(keep) if after else layer.register_forward_pre_hook(keep)
        for layer in layers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _is_grid(rows: int, columns: int, images: Tensor) -> bool:
    """Whether so many places can be those of ``images`` (B, C, H, W): more than one, in about the
    same proportions."""
    height, width = images.shape[-2:]
    return rows * columns > 1 and abs(rows * width / height - columns) < max(1, width / height)


def _is_map(output: object, images: Tensor) -> bool:
    """Whether it is (1, C, h, w) or (1, h, w, C), of places of ``images``.

    The weights of attention, (1, heads, N, N), have this form as well: their rows are shares.
    """
    if not isinstance(output, Tensor) or output.ndim != 4 or not output.requires_grad:
        return False
    _, first, second, third = output.shape
    if not (_is_grid(second, third, images) or _is_grid(first, second, images)):
        return False
    rows = output.detach().sum(-1)
    return not (torch.allclose(rows, torch.ones_like(rows), atol=1e-3) and (output >= 0).all())


def _is_patches(x: object, model: nn.Module, images: Tensor) -> bool:
    """Whether it is (1, N, D), of a grid of patches of ``images`` with a few tokens before."""
    is_tokens = isinstance(x, Tensor) and x.ndim == 3 and len(x) == 1 and x.requires_grad
    return is_tokens and _patches_in(x.shape[1], model, images) is not None


def _patches_in(count: int, model: nn.Module, images: Tensor) -> tuple[int, int, int] | None:
    """How many of ``count`` tokens come before a grid of patches, its rows and columns; None where
    there is none."""
    known = getattr(model, "num_prefix_tokens", None)
    height, width = images.shape[-2:]
    for prefix in range(3) if known is None else (known,):
        patches = max(0, count - prefix)
        exact = math.sqrt(patches * height / width)
        for rows in {round(exact), math.floor(exact), math.ceil(exact)} - {0}:
            if patches % rows == 0 and _is_grid(rows, patches // rows, images):
                return prefix, rows, patches // rows
    return None


def _channels_first(x: Tensor, model: nn.Module, images: Tensor) -> Tensor:
    """A feature map or tokens of one image as (C, rows, columns)."""
    if x.ndim == 4:
        last = getattr(model, "output_fmt", "") == "NHWC" or not _is_grid(*x.shape[2:], images)
        return x[0].permute(2, 0, 1) if last else x[0]
    found = _patches_in(x.shape[1], model, images)
    if found is None:
        raise UserError(f"{x.shape[1]} tokens of {type(model).__name__} are no grid of patches")
    prefix, *grid = found
    return x[0, prefix:].T.unflatten(1, grid)


# --- images -------------------------------------------------------------------------------------


def overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """``image`` with (H, W) heat in 0..1 over it, of the image's size."""
    from matplotlib import colormaps

    colors = Image.fromarray((colormaps["jet"](heat.numpy())[..., :3] * 255).astype(np.uint8))
    mask = Image.fromarray((heat.numpy() * 160).astype(np.uint8))
    size = image.size
    colors, mask = (x.resize(size, Image.Resampling.BILINEAR) for x in (colors, mask))
    return Image.composite(colors, image, mask)


def seen(
    tensor: Tensor, mean: Sequence[float], std: Sequence[float], bit_depth: int = 8
) -> Image.Image:
    """The part of an image that the model sees: a normalised (C, H, W) tensor back as RGB; of 16
    bits, and of other bands than grey and colours, what ``composite`` shows."""
    pixels = tensor * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    pixels = pixels.clamp(0, 1)
    if bit_depth == 8 and len(pixels) in (1, 3):
        pixels = (pixels * 255).round().to(torch.uint8)
    return composite(pixels.numpy())


def enlarged(model: trained.Trained, tensor: Tensor) -> Image.Image:
    """What ``model`` sees of an image, ``SIDE`` pixels at least: small inputs are drawn large
    enough to be looked at."""
    form = model.content["preprocessing"]
    image = seen(tensor, form["mean"], form["std"], form.get("bit_depth", 8))
    factor = max(1, SIDE / max(image.size))
    size = [round(factor * side) for side in image.size]
    return image.resize(size, Image.Resampling.NEAREST)


# --- command line ---------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("explain", __doc__)
    trained.add_model_arguments(parser)
    parser.add_argument(
        "inputs", nargs="+", help="images, folders, quoted patterns, CSV files, or -"
    )
    parser.add_argument("--method", choices=METHODS, default="auto")
    parser.add_argument(
        "--layer",
        type=int,
        help="attention of this layer, from 0 (CaiT: class attention last)",
    )
    parser.add_argument("--head", type=int, help="--layer: this head, from 0 (default: their mean)")
    parser.add_argument("--class", dest="name", help=ABOUT)
    parser.add_argument("--output", type=Path, default=Path("explanations"), help="folder")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Raise OptionError for options that contradict each other."""
    if arguments.head is not None and arguments.layer is None:
        raise OptionError("head", "is one of a layer: add --layer L")
    if arguments.layer is not None:
        if arguments.method != "auto":
            raise OptionError("layer", f"contradicts --method {arguments.method}: leave one out")
        if arguments.name is not None:
            raise OptionError("layer", "attention is the same for all classes: leave out --class")


def _run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    model = trained.open_model(arguments)
    classifier = model.classifier
    index = None
    if arguments.name is not None:
        if arguments.name not in classifier.class_names:
            raise OptionError("class", f"the model knows no class {arguments.name!r}")
        index = classifier.class_names.index(arguments.name)
    paths = trained.find_images(arguments.inputs)
    page = Page(f"What {arguments.model} looks at")
    unreadable = 0
    for number, path in enumerate(command.progress(paths, "images", total=len(paths))):
        try:
            tensor = classifier.transform(path)
        except BadImageError as error:
            say(f"{path}: {error}", error=True)
            unreadable += 1
            continue
        image = enlarged(model, tensor)
        answer = trained.probabilities(classifier, tensor[None].to(model.device))[0].cpu()
        asked = _asked(classifier, arguments, index, answer)
        page.image(image, _caption(classifier, path, asked[0], answer), width=SIDE)
        for place, about in enumerate(asked, start=1):
            heat = heatmap(
                classifier,
                tensor,
                about,
                arguments.method,
                layer=arguments.layer,
                head=arguments.head,
            )
            drawn = overlay(image, heat)
            end = f"-{place}" if len(asked) > 1 else ""
            file = arguments.output / f"{number:04d}-{Path(path).stem}{end}.png"
            with command.written(file) as temporary:
                drawn.save(temporary)
            page.image(drawn, _caption(classifier, path, about, answer), width=SIDE)
    page.write(arguments.output / "explain.html")
    say(f"explanations: {arguments.output / 'explain.html'}")
    return trained.SOME_UNREADABLE if unreadable else 0


def _asked(
    classifier: Classifier, arguments: argparse.Namespace, index: int | None, answer: Tensor
) -> Sequence[int | None]:
    """The classes to draw a map for; None: the likeliest, or all alike.

    Of a multi-label model each label that is there has its own, where the method goes by class.
    """
    by_class = arguments.layer is None and arguments.method in ("auto", "grad-cam")
    if index is not None or not by_class or not labels.is_multilabel(classifier):
        return [index]
    found = labels.found(answer.numpy(), labels.thresholds_of(classifier)).tolist()
    return found or [int(answer.argmax())]


def _caption(classifier: Classifier, path: str, about: int | None, answer: Tensor) -> str:
    index = int(answer.argmax()) if about is None else about
    caption = f"{Path(path).name}: {classifier.class_names[index]} {100 * answer[index]:.1f} %"
    if labels.is_multilabel(classifier):
        threshold = labels.thresholds_of(classifier)[index]
        caption += "" if answer[index] >= threshold else f", below its {100 * threshold:.1f} %"
    return caption


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
