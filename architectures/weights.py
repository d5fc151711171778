"""Weights of another model: names and position embeddings fitted, the rest complete or refused."""

import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import timm.models
import torch
from torch import Tensor, nn

from architectures.first_conv import adapt_first_convs
from architectures.position_embeddings import TOKENS, Fitted, fit_positions
from architectures.size_tables import depends_on_size, fit_tables, size_hint
from architectures.sizes import ImageSize
from architectures.torchvision_names import is_torchvisions, lacking_epsilon, timm_names
from errors import CheckpointError, first_names

log = logging.getLogger(__name__)

# How timm's modules call the function that turns published state dicts into the model's.
_FILTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
# What models call their classifiers, and the layer of ViT in front of one that was only for it.
_HEADS = re.compile(r"^(heads?|head_dist|aux_head|fc|classifier|last_linear|pre_logits)\.")
# What follows from the size of the image or counts batches; files hold it, or don't.
_COMPUTED = re.compile(
    r"(^|\.)(relative_position_index|relative_coords_table|attn_mask|num_batches_tracked)$"
)
# LayerScale, by timm's and by the published names: a factor for each channel of a block's result.
_LAYER_SCALE = re.compile(r"(^|\.)(gamma(_?\d)*|layer_scale\w*(\.\w+)?|res_scale\d\.scale)$")
# ViT's: the block, and the number of the scale; and the layer whose result each of them multiplies.
_VIT_SCALE = re.compile(r"(.*\.)(?:ls([12])\.gamma|gamma_([12]))")
_SCALED_LAYERS = {"1": "attn.proj", "2": "mlp.fc2"}


class PartialWeightsError(CheckpointError):
    """A checkpoint of the same kind of model that lacks parts, or holds some of another."""


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint's tensors, by the model's names where it has them."""

    loaded: list[str] = field(default_factory=list)
    """Copied as they are."""
    fitted: dict[str, str] = field(default_factory=dict)
    """Changed to fit, and how."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Left out, and why."""
    missing: list[str] = field(default_factory=list)
    """The model's own that keep their initial values."""

    def summary(self) -> str:
        """One line for the log."""
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.fitted:
            parts.append(f"{len(self.fitted)} fitted: {_listed(self.fitted)}")
        if self.skipped:
            parts.append(f"{len(self.skipped)} left out: {_listed(self.skipped)}")
        if self.missing:
            parts.append(f"{len(self.missing)} newly initialised: {first_names(self.missing, 6)}")
        return "; ".join(parts)


def _listed(reasons: Mapping[str, str]) -> str:
    return first_names([f"{name} ({why})" for name, why in reasons.items()], 6)


def load_pretrained_weights(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    *,
    allow_partial: bool = False,
    size: ImageSize | None = None,
) -> LoadReport:
    """Copy ``state_dict`` into ``model``, in place, and say what was done.

    Prefixes of DDP and torch.compile are stripped, a model that is a part of another module (DINO's
    ``backbone``, MoCo's ``base_encoder``, Lightning's ``model``) is taken out of it, names of other
    conventions become the model's
    (by timm's function for published weights of it), and position embeddings are fitted
    (:func:`architectures.position_embeddings.fit_positions`). A model with LayerScale gets scales
    of 1 from weights that know none, and one without takes a ViT's scales into the layers that they
    multiply: it computes what the weights did. The first convolution of weights for three colours
    is adapted to the model's channels (:mod:`architectures.first_conv`).

    These alone may be new in the model, or be left out of the checkpoint:

    - the classifier: the modules of the model's ``get_classifier`` and of "classifier" in its
      ``pretrained_cfg``; in the checkpoint also what goes by the usual names of one;
    - tokens that the other side doesn't have: class, distillation and register tokens in the
      model, class and distillation token in the checkpoint;
    - buffers that aren't learnt, which are neither loaded nor listed where they don't fit.

    Args:
        model: what is to be filled; unchanged after an error.
        state_dict: tensors by name; what is no tensor is left out.
        allow_partial: load what fits where other parts are missing or left over.
        size: of the images, in pixels, that the weights were trained for, where that is known.

    Raises:
        CheckpointError: less than a tenth of the model's values would be loaded: the checkpoint is
            another model's.
        PartialWeightsError: any other part is missing or left over; unless ``allow_partial``.
    """
    own = model.state_dict()
    given = {re.sub(r"^(?:module\.|_orig_mod\.)+", "", name): x for name, x in state_dict.items()}
    source = _unwrapped({n: x for n, x in given.items() if isinstance(x, Tensor)}, own)
    report = LoadReport()
    known, changes = _in_its_terms(model, own, source, report, size)
    new = _matched(own, known, changes, report)
    _without_half_a_classifier(model, new, report)
    _refuse_another_models(model, own, source, new, report)
    if not allow_partial:
        _check_complete(model, known, report, size)
    others = [name for name, x in given.items() if not isinstance(x, Tensor)]
    report.skipped.update(dict.fromkeys(others, "not a tensor"))
    with torch.no_grad():
        for name, value in new.items():
            own[name].copy_(value)
    return report


def _refuse_another_models(
    model: nn.Module,
    own: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    report: LoadReport,
) -> None:
    """Raise CheckpointError if too little of ``source`` is left in ``new``."""
    if sum(x.numel() for x in new.values()) < 0.1 * sum(x.numel() for x in own.values()):
        left_out = f"; left out {_listed(report.skipped)}" if report.skipped else ""
        others = is_torchvisions(source) and not is_torchvisions(own)
        hint = "; weights of torchvision's are for --model torchvision/NAME" if others else ""
        if others and (epsilon := lacking_epsilon(model, source)):
            hint += f", or for this model with --bn-eps {epsilon:g}"
        raise CheckpointError(
            f"the checkpoint belongs to another model: {len(new)} of {len(own)} tensors fit "
            f"{type(model).__name__}{left_out}{hint}"
        )


def _unwrapped(source: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``source`` without the name of the module that the model is a part of, and without the other
    parts of that; as it is where most names are the model's ``own`` already."""
    fitting: dict[str, int] = {}
    for name in source:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in own:
                outer = "".join(f"{part}." for part in parts[:i])
                fitting[outer] = fitting.get(outer, 0) + 1
    # Of equally many the first: MoCo's momentum encoder comes after the encoder.
    outer = max(fitting, key=fitting.__getitem__, default="")
    if fitting.get(outer, 0) < len(own) / 2 or fitting.get("", 0) >= fitting[outer]:
        return source
    inner = {n.removeprefix(outer): x for n, x in source.items() if n.startswith(outer)}
    others = [n for n in source if not n.startswith(outer)]
    beside = f"; {len(others)} others are left out: {first_names(others, 3)}" if others else ""
    log.info("the checkpoint's %s* are the model%s", outer, beside)
    return inner


def _in_its_terms(
    model: nn.Module,
    own: Mapping[str, Tensor],
    source: dict[str, Tensor],
    report: LoadReport,
    size: ImageSize | None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``source`` with the names and position embedding of ``model``, whose tensors are ``own``, and
    what had to be changed, and how. Positions that can't be fitted go into the report."""
    # DINOv2's name; timm's function would take the positions apart on meeting it.
    source = {name.replace("register_tokens", "reg_token"): x for name, x in source.items()}
    source = timm_names(model, source, own)
    try:
        positions = fit_positions(model, source, size)
    except CheckpointError as error:
        del source["pos_embed"]
        report.skipped["pos_embed"] = str(error)
        positions = Fitted()
    # Twice: timm's functions for published weights take all tables for squares.
    tables = fit_tables(model, source, size)
    known = _renamed(model, own, source | positions.tensors | tables)
    later = fit_tables(model, {n: x for n, x in known.items() if n not in source}, size)
    known |= later
    changes = dict(positions.how)
    changes |= {name: f"{_shape(source[name])} to {_shape(x)}" for name, x in tables.items()}
    changes |= dict.fromkeys(later, "to the size of the images")
    for name in known.keys() & source.keys() - changes.keys():
        if known[name].shape != source[name].shape:
            changes[name] = f"{_shape(source[name])} to {_shape(known[name])}"
    if not any(_LAYER_SCALE.search(name) for name in own):
        known = _with_scales_in_layers(known, changes)
    return adapt_first_convs(model, own, known, changes), changes


def _matched(
    own: Mapping[str, Tensor],
    known: Mapping[str, Tensor],
    changes: Mapping[str, str],
    report: LoadReport,
) -> dict[str, Tensor]:
    """What is to be copied into ``own``, by name; the report is filled."""
    new = {}
    for name, value in known.items():
        if name not in own:
            if not _is_computed(name, value):
                report.skipped[name] = "not in this model"
        elif value.shape == own[name].shape:
            new[name] = value
            if name in changes:
                report.fitted[name] = changes[name]
            else:
                report.loaded.append(name)
        elif not _is_computed(name, own[name]):
            report.skipped[name] = f"{_shape(value)} in the checkpoint, {_shape(own[name])} here"
    if not any(_LAYER_SCALE.search(name) for name in known):
        for name in own:
            if _LAYER_SCALE.search(name):
                new[name] = torch.ones_like(own[name])
                report.fitted[name] = "1: the checkpoint has no LayerScale"
    report.missing.extend(n for n, x in own.items() if n not in new and not _is_computed(n, x))
    return new


def _without_half_a_classifier(
    model: nn.Module, new: dict[str, Tensor], report: LoadReport
) -> None:
    """Where a part of the classifier doesn't fit, the others belong to other classes too; where it
    is a list of a layer for each class, also where one of them is missing."""
    heads = _declared_heads(model)
    signs = list(report.skipped)
    if isinstance(_classifier(model), nn.ModuleList):
        signs += report.missing
    if any(_below(heads, name) for name in signs):
        for name in [name for name in new if _below(heads, name)]:
            del new[name]
            report.loaded[:] = [other for other in report.loaded if other != name]
            report.fitted.pop(name, None)
            report.skipped[name] = "of a classifier that doesn't fit"
            report.missing.append(name)


def _with_scales_in_layers(
    weights: Mapping[str, Tensor], changes: dict[str, str]
) -> dict[str, Tensor]:
    """``weights`` of a ViT without LayerScale that compute the same, γ (W x + b)."""
    found = dict(weights)
    for name, scale in weights.items():
        match = _VIT_SCALE.fullmatch(name)
        layer = match[1] + _SCALED_LAYERS[match[2] or match[3]] if match else ""
        if f"{layer}.weight" not in found:
            continue
        del found[name]
        for part in (f"{layer}.weight", f"{layer}.bias"):
            if part in found:
                rows = scale.view(-1, *(1 for _ in found[part].shape[1:]))
                found[part] = rows * found[part]
                changes[part] = "with its LayerScale"
    return found


def _is_computed(name: str, value: Tensor) -> bool:
    return bool(_COMPUTED.search(name)) or not (value.is_floating_point() or value.is_complex())


def _shape(x: Tensor) -> str:
    return "×".join(map(str, x.shape)) or "scalar"


# --- names ----------------------------------------------------------------------------------------


def _renamed(
    model: nn.Module, own: Mapping[str, Tensor], source: dict[str, Tensor]
) -> dict[str, Tensor]:
    """``source`` by the names of ``model``, whose tensors are ``own``.

    The function for published weights of the model knows other names for it. Given weights that it
    wasn't written for it may fail, and those stay as they are.
    """
    change = _filter_of(model)
    fitting = {n: source[n] for n, x in own.items() if n in source and source[n].shape == x.shape}
    if change is None or len(fitting) == len(own) == len(source):
        return source
    # Positions that fit already are ours to know: it would count with the model's own tokens.
    seen = {n: x for n, x in source.items() if n != "pos_embed" or n not in fitting}
    values: dict[str, Any] = {"model": model, "adapt_layer_scale": True}
    accepted = inspect.signature(change).parameters
    values = {name: value for name, value in values.items() if name in accepted}
    try:
        changed = change(seen, **values)
    except CheckpointError:
        raise
    except Exception:  # whatever the missing names lead to
        return source
    # Some leave out what isn't in the files they were written for.
    return {n: x for n, x in changed.items() if isinstance(x, Tensor)} | fitting


def _filter_of(model: nn.Module) -> Callable[..., dict[str, Any]] | None:
    """What turns published state dicts into ones of ``model``, or None."""
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
    modules = [type(model).__module__]
    if timm.is_model(architecture):
        entry = timm.models.model_entrypoint(architecture)
        if getattr(entry, "filter_fn", None) is not None:
            return entry.filter_fn
        modules.insert(0, entry.__module__)
    found = (getattr(sys.modules[m], name, None) for m in modules for name in _FILTERS)
    return next(filter(None, found), None)


# --- what may be new ------------------------------------------------------------------------------


def _check_complete(
    model: nn.Module, known: Mapping[str, Tensor], report: LoadReport, size: ImageSize | None
) -> None:
    """PartialWeightsError if something is missing or left out that may not be."""
    heads = _heads(model)
    own_tokens = set(TOKENS) - known.keys()
    missing = [n for n in report.missing if not (n in own_tokens or _below(heads, n))]
    spare = {"cls_token", "dist_token"} - model.state_dict().keys()
    unused = {
        name: why
        for name, why in report.skipped.items()
        if not (name in spare or _below(heads, name))
        and not (name not in model.state_dict() and _HEADS.search(name))
    }
    if missing or unused:
        parts = []
        if missing:
            parts.append(f"missing ({len(missing)}): {first_names(missing)}")
        if unused:
            parts.append(f"left over ({len(unused)}): {_listed(unused)}")
        resized = {name: known[name] for name in unused if name in known and name in missing}
        if depends_on_size(resized):
            parts.append(size_hint(model, resized, size))
        raise PartialWeightsError(
            f"the checkpoint doesn't fill {type(model).__name__}: {'; '.join(parts)}"
        )


def _heads(model: nn.Module) -> set[str]:
    """The names of the modules that are the model's classifier."""
    classifier = _classifier(model)
    if isinstance(classifier, Mapping):
        classifier = classifier.values()
    parts = list(classifier) if isinstance(classifier, Iterable) else [classifier]
    ids = {id(part) for part in (classifier, *parts) if isinstance(part, nn.Module)}
    names = {name for name, module in model.named_modules() if name and id(module) in ids}
    return names | _declared_heads(model)


def _classifier(model: nn.Module) -> Any:
    """What the model calls its classifier: a module, or several; None where it doesn't say."""
    try:
        return model.get_classifier()
    except (AttributeError, NotImplementedError):
        return None


def _declared_heads(model: nn.Module) -> set[str]:
    """What timm takes for the layers that belong to certain classes."""
    declared = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return {declared} if isinstance(declared, str) else set(declared)


def _below(modules: Iterable[str], name: str) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)
