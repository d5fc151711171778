"""Teachers of distillation: a model with its weights, that takes the student's images."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from architectures.factory import has_published_weights, published_cfg
from architectures.library_model import LIBRARIES
from architectures.sizes import size_text
from architectures.variant import PLAIN, Variant
from architectures.weights import load_pretrained_weights
from augmentation.preprocessing import Preprocessing
from checkpointing.files import (
    CLASSIFICATION,
    class_names_of,
    load_checkpoint,
    model_of,
    task_of,
    weights_of,
)
from checkpointing.published import FOLDER, HUB, TIMM, classes_of, is_published, label_names
from checkpointing.variants import saved_variant
from config import LossOptions
from errors import CheckpointError, OptionError
from pipeline import imagenet

log = logging.getLogger(__name__)


class ConvertedTeacher(nn.Module):
    """A teacher that gets the images of a student as its own preprocessing would make them.

    (B, 3, H, W) normalised as ``student`` says are normalised as ``own`` says and resized to its
    input size; both are linear and commute with mixing. Greys become as many equal channels as the
    teacher has. The crop is the student's. Pixels leave the
    range of a file's only where bicubic resizing overshoots.
    """

    def __init__(self, teacher: nn.Module, student: Preprocessing, own: Preprocessing) -> None:
        super().__init__()
        self.teacher = teacher
        self.size = own.size
        self.mode = "bilinear" if own.interpolation == "bilinear" else "bicubic"
        mean, std, own_mean, own_std = (
            torch.tensor(values).view(1, -1, 1, 1)
            for values in (student.mean, student.std, own.mean, own.std)
        )
        # ((x · std + mean) - own mean) / own std
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = images * self.scale + self.shift
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode=self.mode, antialias=True)
        return self.teacher(images)


def build_teacher(
    options: LossOptions,
    *,
    num_classes: int,
    preprocessing: Preprocessing,
    class_names: Sequence[str] | None = None,
    task: str = CLASSIFICATION,
    other_sizes: bool = False,
) -> nn.Module | None:
    """The teacher with its weights, on the CPU, or None without distillation.

    It is built for the images it was trained on: those of its checkpoint or, of published weights,
    of timm's configuration of the model. Where the student's ``preprocessing`` has another
    normalisation or size, or is trained at ``other_sizes`` too, it converts them
    (:class:`ConvertedTeacher`), and the log says so. Of weights that are neither nothing is known:
    it takes the student's images as they are.

    Raises:
        OptionError: the weights are of another model, class count or list of classes.
    """
    if options.distillation_type == "none":
        return None
    published = _published_name(options)
    with _blamed_on(_named_by(published, options)):
        cfg = published_cfg(published or options.teacher_model)
    name = published or models.resolve_name(options.teacher_model)
    with _blamed_on("teacher_path"):
        if published:
            if not has_published_weights(cfg):
                message = f"no weights of {name} are published: give a checkpoint"
                raise OptionError("teacher_path", message)
            _check_task(CLASSIFICATION, task)
            _check_count(f"the weights of {name} know", classes_of(cfg), num_classes)
            names = label_names(cfg) or imagenet.class_names(num_classes)
            _check_classes(names, class_names)
            own = Preprocessing.of_model(cfg)
            teacher = _model(name, num_classes, own, pretrained=True)
        else:
            content = load_checkpoint(options.teacher_path)
            _check_task(task_of(content), task)
            _check_classes(class_names_of(content), class_names)
            own = preprocessing
            if "preprocessing" in content:
                own = Preprocessing.from_dict(content["preprocessing"])
            elif has_published_weights(cfg) and cfg["num_classes"] == num_classes:
                own = Preprocessing.of_model(cfg)
            variant = saved_variant(content) if _is_of(content, name) else PLAIN
            teacher = _model(name, num_classes, own, variant=variant)
            _fill(teacher, weights_of(content), options, num_classes)
    return _converted(teacher, preprocessing, own, other_sizes)


def check_teacher(options: LossOptions) -> None:
    """Raise OptionError for a teacher whose name is unknown or whose file is none. Nothing is
    built or downloaded."""
    if options.distillation_type == "none":
        return
    published, path = _published_name(options), options.teacher_path
    with _blamed_on(_named_by(published, options)):
        models.resolve_name(published or options.teacher_model)
    if not published and "://" not in path:
        with _blamed_on("teacher_path"):
            load_checkpoint(path, weights=False)


def _check_task(trained: str, task: str) -> None:
    """Raise OptionError for a teacher whose answers mean something else than the student's."""
    if trained != task:
        raise OptionError(
            "teacher_path", f"the teacher is of --task {trained}: take one of --task {task}"
        )


def _published_name(options: LossOptions) -> str:
    """The name of the published model that is to teach, for ``build_model``; "" for a file."""
    path = options.teacher_path
    if path == "timm":
        return options.teacher_model
    if not is_published(path):
        return ""
    if path.startswith((HUB, FOLDER, *LIBRARIES)):
        return path
    return path.removeprefix(TIMM) if path.startswith(TIMM) else FOLDER + path


def _named_by(published: str, options: LossOptions) -> str:
    """The option that names the teacher's model."""
    return "teacher_path" if published not in ("", options.teacher_model) else "teacher_model"


def _model(
    name: str,
    num_classes: int,
    own: Preprocessing,
    *,
    pretrained: bool = False,
    variant: Variant = PLAIN,
) -> nn.Module:
    return models.build_model(
        name,
        num_classes,
        input_size=own.input_size,
        in_chans=own.channels,
        pretrained=pretrained,
        required=("input_size",),
        variant=variant,
    )


def _is_of(content: Mapping[str, object], name: str) -> bool:
    """Whether a checkpoint of this project is of the model ``name``, in a form that it says."""
    held = model_of(content)
    return held is not None and name in (held, models.ALIASES.get(held.lower()))


def _fill(
    teacher: nn.Module, weights: Mapping[str, Tensor], options: LossOptions, num_classes: int
) -> None:
    _check_layers(teacher, weights, num_classes)
    try:
        report = load_pretrained_weights(teacher, weights)
        reason = report.summary() if report.missing or report.skipped else ""
    except CheckpointError as error:
        reason = str(error)
    if reason:
        raise OptionError(
            "teacher_path",
            f"{options.teacher_path} doesn't hold a {options.teacher_model} ({reason}): "
            "name its model with --teacher-model",
        )


def _converted(
    teacher: nn.Module, student: Preprocessing, own: Preprocessing, other_sizes: bool
) -> nn.Module:
    """``teacher`` for the student's images, which are seldom its own."""
    changes = []
    if own.channels != student.channels and student.channels != 1:
        raise OptionError(
            "teacher_path",
            f"the teacher takes images of {own.channels} channels, the student of "
            f"{student.channels}: give one that was trained on such images",
        )
    if (own.mean, own.std) != (student.mean, student.std):
        mean, std = (" ".join(f"{x:g}" for x in values) for values in (own.mean, own.std))
        changes.append(f"normalised by mean {mean} and std {std}")
    if own.size != student.size:
        sizes = size_text(student.size), size_text(own.size)
        changes.append("resized from {} to {} pixels".format(*sizes))
    elif other_sizes:
        changes.append(f"resized to {size_text(own.size)} pixels")
    if not changes:
        return teacher
    log.info("the teacher sees the student's images as its own: %s", ", ".join(changes))
    return ConvertedTeacher(teacher, student, own)


@contextlib.contextmanager
def _blamed_on(option: str) -> Iterator[None]:
    """Errors about a model or checkpoint inside concern the teacher's ``option``."""
    try:
        yield
    except OptionError as error:
        if error.option == option:
            raise
        message = error.message.replace("--no-pretrained --finetune FILE", "--teacher-path FILE")
        raise OptionError(option, message) from error
    except CheckpointError as error:
        raise OptionError(option, str(error)) from error


def _check_count(who: str, theirs: int, ours: int) -> None:
    if theirs != ours:
        raise OptionError(
            "teacher_path",
            f"{who} {theirs} classes, the data set has {ours}: "
            "give the checkpoint of a teacher trained on it",
        )


def _check_classes(theirs: Sequence[str] | None, ours: Sequence[str] | None) -> None:
    """OptionError unless a teacher's classes are the data set's, in its order.

    ImageNet's go by several names. Of weights without names nothing is known, but where the data
    set's are as many classes of ImageNet's.
    """
    if ours is None or (theirs is not None and list(theirs) == list(ours)):
        return
    ids = imagenet.ids_of(theirs) if theirs else imagenet.wordnet_ids(len(ours))
    if ids is not None and len(ids) == len(ours):
        found = imagenet.find(ours, len(ours))
        if theirs and all(name.isdecimal() for name in ours):  # the numbers of the classes
            found = list(map(int, ours))
        if found == list(range(len(ours))) or (theirs is None and None in found):
            return
        # Those that are the same ones have the same name here.
        theirs = [
            b if i == at else a for i, (a, b, at) in enumerate(zip(ids, ours, found, strict=True))
        ]
    if theirs is None:
        return
    _check_count("the teacher knows", len(theirs), len(ours))
    index = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    raise OptionError(
        "teacher_path",
        f"the teacher's class {index} is {theirs[index]!r}, the data set's {ours[index]!r}: "
        "it must be trained on the same classes",
    )


def _check_layers(teacher: nn.Module, weights: Mapping[str, Tensor], num_classes: int) -> None:
    """OptionError if a layer's weights differ from the model's in the class count alone."""
    for key, own in teacher.state_dict().items():
        known = weights[key].shape[0] if key in weights and weights[key].ndim else 0
        alike = known and weights[key].shape[1:] == own.shape[1:]
        if own.ndim == 2 and alike and own.shape[0] == num_classes:
            _check_count("the teacher knows", known, num_classes)
