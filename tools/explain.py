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
from timm.models.vision_transformer import Attention as TimmAttention
from torch import Tensor, nn

from cait_models import Class_Attention
from errors import OptionError, UserError
from inference import Classifier
from models import Attention
from outputs.console import say
from pipeline.decoding import BadImageError
from tools.common import command, trained
from tools.common.page import Page

METHODS = ("auto", "rollout", "last", "grad-cam")
SELF_ATTENTION = (Attention, TimmAttention)


def heatmap(
    classifier: Classifier, tensor: Tensor, class_index: int | None = None, method: str = "auto"
) -> Tensor:
    """Where the model looks on an image. Other threads may use the model meanwhile.

    Args:
        classifier: as of ``inference.load_for_inference``, of a checkpoint.
        tensor: the image as ``classifier.transform`` makes it, (3, H, W).
        class_index: the class in question, None for the likeliest.
        method: "rollout" follows attention through all layers, "last" takes the last layer's,
            "grad-cam" weighs the last feature map by its gradients. "auto" is Grad-CAM where a
            class is asked for, which attention doesn't show, or the model has none; else rollout.

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
        attends = class_index is None and bool(_attention_layers(model))
        method = "rollout" if attends else "grad-cam"
    images = tensor[None].to(parameter.device)
    if method == "grad-cam":
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


# --- attention ------------------------------------------------------------------------------------


def attention_map(model: nn.Module, images: Tensor, *, last: bool = False) -> Tensor:
    """Attention from the answer to the patches of one image (1, 3, H, W): (rows, columns).

    Rollout (arXiv:2005.00928) multiplies the layers' attention, half of each being the identity for
    the residual connection. In CaiT only the class-attention layers are followed, as in its paper.
    """
    layers = _attention_layers(model)
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no attention that can be followed: --method grad-cam"
        )
    with torch.no_grad(), recorded(layers) as weights:
        model(images)
    averages = [layer.mean(1)[0] for layer in weights]  # heads
    if isinstance(layers[0], Class_Attention):
        averages = [_with_silent_patches(row) for row in averages]
        prefix = 1
    else:
        prefix = model.num_prefix_tokens
    flow = averages[-1] if last else rollout(averages)
    asked = flow[_read_by_heads(model, prefix)].mean(0)[prefix:]
    return asked.unflatten(0, _grid(model, len(asked)))


def _read_by_heads(model: nn.Module, prefix: int) -> slice:
    """The tokens that the answer is made of: class and distillation, or the patches' mean."""
    if getattr(model, "global_pool", "token") != "token":
        return slice(prefix, None)
    return slice(0, 2 if hasattr(model, "head_dist") else 1)


def rollout(layers: Sequence[Tensor]) -> Tensor:
    """(N, N) attention of each layer, heads averaged, to that of the last on the first's input."""
    identity = torch.eye(len(layers[0]), dtype=layers[0].dtype, device=layers[0].device)
    flow = identity
    for attention in layers:
        mixed = (attention + identity) / 2
        flow = mixed / mixed.sum(-1, keepdim=True) @ flow
    return flow


def _with_silent_patches(row: Tensor) -> Tensor:
    """(1, N) class attention as (N, N): in these layers the patches stay what they are."""
    square = torch.eye(row.shape[1], dtype=row.dtype, device=row.device)
    square[:1] = row
    return square


def _attention_layers(model: nn.Module) -> list[nn.Module]:
    """The layers between the patches and the answer, in order; class attention where there is."""
    layers = [m for m in model.modules() if isinstance(m, Class_Attention)]
    if layers or not hasattr(model, "num_prefix_tokens"):
        return layers
    return [m for m in model.modules() if isinstance(m, SELF_ATTENTION)]


def _grid(model: nn.Module, count: int) -> tuple[int, int]:
    embed = getattr(model, "patch_embed", None)
    rows, columns = getattr(embed, "grid_size", None) or (0, 0)
    if rows * columns != count:
        raise UserError(f"{count} tokens of {type(model).__name__} are no grid of patches")
    return rows, columns


@contextmanager
def recorded(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that gets each layer's attention, (B, heads, queries, N), as the model runs.

    The fused attention keeps its weights to itself: they are computed again from its input.
    """
    weights: list[Tensor] = []
    caller = threading.get_ident()

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # A server's other threads may be using the same model.
        if threading.get_ident() == caller:
            weights.append(_attention(layer, inputs[0]))

    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()


def _attention(layer: nn.Module, x: Tensor) -> Tensor:
    """(B, N, D) tokens to (B, heads, queries, N) weights, as the layer computes them."""
    if isinstance(layer, Class_Attention):
        q, k = (
            y.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
            for y in (layer.q(x[:, :1]), layer.k(x))
        )
    else:
        qkv = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if isinstance(layer, TimmAttention):
        q, k = layer.q_norm(q), layer.k_norm(k)
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


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
    layers, inner = _attention_layers(model), [m for m in model.modules() if m is not model]
    with torch.enable_grad():
        if layers:
            with _kept(layers[-1:], lambda inputs, output: inputs[:1]) as found:
                logits = model(images)
        elif hasattr(model, "forward_features") and hasattr(model, "forward_head"):
            logits, found = _from_features(model, inner, images)
        else:
            with _kept(
                inner, lambda inputs, output: filter(_is_map, [output]), after=True
            ) as found:
                logits = model(images)
    index = int(logits[0].argmax()) if class_index is None else class_index
    for features in reversed(found):
        gradient = torch.autograd.grad(
            logits[0, index], features, retain_graph=True, allow_unused=True
        )[0]
        if gradient is None:
            continue
        gradient = _channels_first(gradient, model)
        if not layers:
            if features.ndim == 3 and not gradient.any():
                continue  # from here on the class token alone is read
            gradient = gradient.mean((1, 2), keepdim=True)
        return (gradient * _channels_first(features.detach(), model)).sum(0).relu()
    raise UserError(f"{type(model).__name__} has no feature map that Grad-CAM could look at")


def _from_features(
    model: nn.Module, inner: Sequence[nn.Module], images: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The logits, and the maps or patches that they come from, in order, by timm's interface.

    A map is what ``forward_features`` returns. Where the answer is read from a class token, it
    comes from patches that went into a norm before, as the sum of all blocks so far.
    """
    inner = [layer for layer in inner if isinstance(layer, nn.LayerNorm)] or inner
    with _kept(inner, lambda inputs, output: [x for x in inputs if _is_patches(x, model)]) as found:
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
    if _is_patches(features, model):
        [gradient] = torch.autograd.grad(logits.square().sum(), features, retain_graph=True)
        if _channels_first(gradient, model).any():
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


def _is_map(output: object) -> bool:
    """Whether it is (1, C, h, w) or (1, h, w, C), of more than one place; images are square.

    The weights of attention, (1, heads, N, N), have this form as well: their rows are shares.
    """
    if not isinstance(output, Tensor) or output.ndim != 4 or not output.requires_grad:
        return False
    _, first, second, third = output.shape
    if not (second == third > 1 or first == second > 1):
        return False
    rows = output.detach().sum(-1)
    return not (torch.allclose(rows, torch.ones_like(rows), atol=1e-3) and (output >= 0).all())


def _is_patches(x: object, model: nn.Module) -> bool:
    """Whether it is (1, N, D), of a square grid of patches with at most a few tokens before."""
    is_tokens = isinstance(x, Tensor) and x.ndim == 3 and len(x) == 1 and x.requires_grad
    return is_tokens and _tokens_before(x.shape[1], model) is not None


def _tokens_before(count: int, model: nn.Module) -> int | None:
    """How many of ``count`` tokens come before a square of patches; None where there is none."""
    known = getattr(model, "num_prefix_tokens", None)
    for prefix in range(3) if known is None else (known,):
        side = math.isqrt(max(0, count - prefix))
        if side > 1 and side**2 == count - prefix:
            return prefix
    return None


def _channels_first(x: Tensor, model: nn.Module) -> Tensor:
    """A feature map or tokens of one image as (C, rows, columns)."""
    if x.ndim == 4:
        last = getattr(model, "output_fmt", "") == "NHWC" or x.shape[2] != x.shape[3]
        return x[0].permute(2, 0, 1) if last else x[0]
    prefix = _tokens_before(x.shape[1], model)
    if prefix is None:
        raise UserError(f"{x.shape[1]} tokens of {type(model).__name__} are no square of patches")
    patches = x[0, prefix:]
    return patches.T.unflatten(1, (math.isqrt(len(patches)), -1))


# --- images -------------------------------------------------------------------------------------


def overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """``image`` with (H, W) heat in 0..1 over it, of the image's size."""
    from matplotlib import colormaps

    colors = Image.fromarray((colormaps["jet"](heat.numpy())[..., :3] * 255).astype(np.uint8))
    mask = Image.fromarray((heat.numpy() * 160).astype(np.uint8))
    size = image.size
    colors, mask = (x.resize(size, Image.Resampling.BILINEAR) for x in (colors, mask))
    return Image.composite(colors, image, mask)


def seen(tensor: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The part of an image that the model sees: a normalised (3, H, W) tensor back as RGB."""
    pixels = tensor * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


# --- command line ---------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("explain", __doc__)
    trained.add_model_arguments(parser)
    parser.add_argument(
        "inputs", nargs="+", help="images, folders, quoted patterns, CSV files, or -"
    )
    parser.add_argument("--method", choices=METHODS, default="auto")
    parser.add_argument("--class", dest="name", help="the class in question (default: likeliest)")
    parser.add_argument("--output", type=Path, default=Path("explanations"), help="folder")
    return parser


def _run(arguments: argparse.Namespace) -> int:
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
        heat = heatmap(classifier, tensor, index, arguments.method)
        image = seen(tensor, *_normalisation(model))
        # Small inputs are drawn large enough to be looked at.
        image = image.resize([max(224, side) for side in image.size], Image.Resampling.NEAREST)
        drawn = overlay(image, heat)
        answer = trained.probabilities(classifier.model, tensor[None].to(model.device))[0]
        shown = int(answer.argmax()) if index is None else index
        caption = f"{Path(path).name}: {classifier.class_names[shown]} {100 * answer[shown]:.1f} %"
        _save(drawn, arguments.output / f"{number:04d}-{Path(path).stem}.png")
        page.image(image, caption, width=224)
        page.image(drawn, caption, width=224)
    page.write(arguments.output / "explain.html")
    say(f"explanations: {arguments.output / 'explain.html'}")
    return trained.SOME_UNREADABLE if unreadable else 0


def _normalisation(model: trained.Trained) -> tuple[Sequence[float], Sequence[float]]:
    preprocessing = model.content["preprocessing"]
    return preprocessing["mean"], preprocessing["std"]


def _save(image: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except OSError as error:
        raise command.not_written(path, error) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
