"""The teacher of distillation: its weights, its classes, and images as it was trained on."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
import pytest
import timm
import timm.models
import torch
from PIL import Image
from torch import Tensor, nn

import losses
import teachers
from augmentation.preprocessing import Preprocessing
from augmentation.transforms import build_transform
from config import AugmentOptions, LossOptions
from errors import OptionError
from pipeline import imagenet

NAMES = ["a", "b", "c"]
STUDENT = Preprocessing(
    input_size=32,
    crop_ratio=1.0,
    interpolation="bicubic",
    mean=timm.data.IMAGENET_DEFAULT_MEAN,
    std=timm.data.IMAGENET_DEFAULT_STD,
)
# Of Inception and ViT; another size.
OTHER = dataclasses.replace(STUDENT, mean=(0.5, 0.5, 0.5), std=(0.5, 0.4, 0.3))
LARGER = dataclasses.replace(OTHER, input_size=48)


def save_teacher(path, name: str = "resnet18", num_classes: int = 3, **extra) -> nn.Module:
    model = timm.create_model(name, num_classes=num_classes)
    torch.save({"model": model.state_dict(), **extra}, path)
    return model.eval()


def build_teacher(
    path, model: str = "resnet18", num_classes: int = 3, class_names: Sequence[str] = NAMES
) -> nn.Module:
    options = LossOptions(distillation_type="hard", teacher_model=model, teacher_path=str(path))
    teacher = teachers.build_teacher(
        options, num_classes=num_classes, preprocessing=STUDENT, class_names=class_names
    )
    return teacher.eval()


def photographs(size: int = 96) -> list[Image.Image]:
    """Two smooth images, which survive resizing."""
    rows, columns = np.mgrid[0:size, 0:size] / size * 2 * np.pi
    waves = [np.sin(rows), np.cos(columns), np.sin(rows + columns)]
    return [
        Image.fromarray((127.5 + 100 * np.stack(waves[i:] + waves[:i], -1)).astype(np.uint8))
        for i in range(2)
    ]


def batch(preprocessing: Preprocessing) -> Tensor:
    transform = build_transform(False, preprocessing, AugmentOptions())
    return torch.stack([transform(image) for image in photographs()])


def test_no_teacher_without_distillation():
    assert teachers.build_teacher(LossOptions(), num_classes=3, preprocessing=STUDENT) is None


def test_teacher_gets_its_weights(tmp_path):
    saved = save_teacher(tmp_path / "t.pth", class_names=NAMES, preprocessing=STUDENT.to_dict())
    teacher = build_teacher(tmp_path / "t.pth")
    assert type(teacher) is type(saved)  # nothing to convert
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher(x), saved(x))


# --- its own images -------------------------------------------------------------------------------


def test_another_normalisation_is_converted(tmp_path, caplog):
    """Of the same pixels the teacher sees exactly what it was trained on."""
    caplog.set_level(logging.INFO)
    saved = save_teacher(tmp_path / "t.pth", preprocessing=OTHER.to_dict())
    teacher = build_teacher(tmp_path / "t.pth")
    assert (batch(STUDENT) - batch(OTHER)).abs().max() > 0.3
    torch.testing.assert_close(teacher(batch(STUDENT)), saved(batch(OTHER)), rtol=1e-4, atol=1e-5)
    assert caplog.text.count("the teacher sees the student's images as its own") == 1
    assert "normalised by mean 0.5 0.5 0.5 and std 0.5 0.4 0.3" in caplog.text


@pytest.mark.parametrize("name", ["resnet18", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("size", [48, 16])
def test_another_size_is_converted(tmp_path, caplog, name, size):
    """Up to the resize of a resized image. A transformer takes images of its own size alone."""
    caplog.set_level(logging.INFO)
    own = dataclasses.replace(OTHER, input_size=size)
    sized = {"img_size": size} if name != "resnet18" else {}
    saved = timm.create_model(name, num_classes=3, **sized).eval()
    torch.save({"model": saved.state_dict(), "preprocessing": own.to_dict()}, tmp_path / "t.pth")
    teacher = build_teacher(tmp_path / "t.pth", name)
    seen = []
    teacher.teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits, expected = teacher(batch(STUDENT)), saved(batch(own))
    assert seen[0].shape == (2, 3, size, size)
    assert (seen[0] - batch(own)).abs().mean() < 0.03
    assert (logits - expected).abs().max() < 0.2 * expected.std() + 0.02
    assert f"resized from 32 to {size} pixels" in caplog.text


def test_resizing_is_pillows(tmp_path):
    """Of a batch already on the device, as if the student's pixels were an image."""
    save_teacher(
        tmp_path / "t.pth", preprocessing=dataclasses.replace(STUDENT, input_size=20).to_dict()
    )
    teacher = build_teacher(tmp_path / "t.pth")
    seen = []
    teacher.teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.rand(1, 3, 32, 32)
    teacher(x)
    for channel in range(3):
        image = Image.fromarray(x[0, channel].numpy(), "F").resize(
            (20, 20), Image.Resampling.BICUBIC
        )
        expected = torch.from_numpy(np.array(image))
        torch.testing.assert_close(seen[0][0, channel], expected, rtol=0, atol=1e-4)


def test_mixed_images_are_converted_alike(tmp_path):
    save_teacher(tmp_path / "t.pth", preprocessing=LARGER.to_dict())
    teacher = build_teacher(tmp_path / "t.pth")
    teacher.teacher = nn.Identity()
    one, two = torch.randn(2, 1, 3, 32, 32)
    mixed = teacher(0.3 * one + 0.7 * two)
    torch.testing.assert_close(mixed, 0.3 * teacher(one) + 0.7 * teacher(two))


def test_converted_teacher_is_fixed_and_moves_with_the_criterion(tmp_path):
    save_teacher(tmp_path / "t.pth", preprocessing=LARGER.to_dict())
    options = LossOptions(distillation_type="soft", teacher_path="t.pth")
    criterion = losses.build_criterion(
        options, num_classes=3, teacher=build_teacher(tmp_path / "t.pth")
    )
    assert list(criterion.parameters()) == [] and criterion.state_dict() == {}
    assert not any(p.requires_grad for p in criterion.teacher.parameters())
    criterion.to(torch.float64)
    student = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    loss = criterion(torch.randn(2, 3, 32, 32).double(), student, torch.tensor([0, 1]))
    loss.backward()
    assert torch.isfinite(loss) and student.grad.abs().sum() > 0


def test_half_precision_images(tmp_path):
    save_teacher(tmp_path / "t.pth", preprocessing=LARGER.to_dict())
    teacher = build_teacher(tmp_path / "t.pth")
    x = torch.randn(2, 3, 32, 32).bfloat16()
    torch.testing.assert_close(teacher(x), teacher(x.float()))


def test_published_weights_in_a_file_have_timms_configuration(tmp_path):
    """Their class count says that they are published ones; of others nothing is known."""
    path = tmp_path / "t.pth"
    saved = save_teacher(path, "vit_tiny_patch16_224", num_classes=1000)
    options = LossOptions(
        distillation_type="hard", teacher_model="vit_tiny_patch16_224", teacher_path=str(path)
    )
    teacher = teachers.build_teacher(options, num_classes=1000, preprocessing=STUDENT).eval()
    own = dataclasses.replace(STUDENT, input_size=224, mean=(0.5,) * 3, std=(0.5,) * 3)
    expected, logits = saved(batch(own)), teacher(batch(STUDENT))
    assert (logits - expected).abs().max() < 0.3 * expected.std()
    save_teacher(tmp_path / "mine.pth")
    assert isinstance(build_teacher(tmp_path / "mine.pth"), timm.models.ResNet)


@pytest.mark.parametrize("path", ["timm", "timm/vit_tiny_patch16_224", "folder"])
def test_published_teacher(tmp_path, monkeypatch, path):
    published = timm.create_model("vit_tiny_patch16_224").eval()
    monkeypatch.setattr(
        timm.models._builder, "load_state_dict_from_hf", lambda *a, **k: published.state_dict()
    )
    if path == "folder":
        path = str(tmp_path)
        timm.models.save_for_hf(published, path)
    options = LossOptions(
        distillation_type="hard", teacher_model="vit_tiny_patch16_224", teacher_path=path
    )
    teacher = teachers.build_teacher(options, num_classes=1000, preprocessing=STUDENT).eval()
    assert isinstance(teacher, teachers.ConvertedTeacher)
    assert teacher.teacher.patch_embed.img_size == (224, 224)
    own = dataclasses.replace(STUDENT, mean=(0.5,) * 3, std=(0.5,) * 3, input_size=224)
    expected = published(batch(own))
    assert (teacher(batch(STUDENT)) - expected).abs().max() < 0.3 * expected.std()


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "known, message",
    [
        (["a", "b"], "knows 2 classes, the data set has 3"),
        (["a", "x", "c"], "class 1 is 'x', the data set's 'b'"),
    ],
)
def test_teacher_of_other_classes_is_refused(tmp_path, known, message):
    save_teacher(tmp_path / "t.pth", class_names=known)
    with pytest.raises(OptionError, match=f"--teacher-path: .*{message}"):
        build_teacher(tmp_path / "t.pth")


def test_classes_of_a_published_teacher(tmp_path):
    """Those in its description, in their order."""
    model = timm.create_model("resnet10t", num_classes=3)
    timm.models.save_for_hf(model, tmp_path, model_config={"label_names": ["a", "c", "b"]})
    with pytest.raises(OptionError, match="--teacher-path: .*class 1 is 'c', the data set's 'b'"):
        build_teacher(tmp_path, class_names=["a", "b", "c"])
    assert build_teacher(tmp_path, class_names=["a", "c", "b"])


def test_imagenets_classes_by_other_names_and_in_another_order(tmp_path):
    """The teacher's order is that of WordNet's ids; sorted English names have another one."""
    small = "mobilenetv3_small_050"
    timm.models.save_for_hf(save_teacher(tmp_path / "file.pth", small, 1000), tmp_path / "hub")
    ids, names = imagenet.wordnet_ids(1000), imagenet.class_names(1000)
    numbers, others = [f"{i:03d}" for i in range(1000)], [f"kind {i:03d}" for i in range(1000)]

    def taught(path: str, classes: Sequence[str]) -> None:
        build_teacher(tmp_path / path, small, 1000, classes)

    for path in ("file.pth", "hub"):
        for classes in (ids, names, numbers):
            taught(path, classes)
        with pytest.raises(
            OptionError, match="class 0 is 'n01440764', the data set's 'Afghan hound"
        ):
            taught(path, sorted(names))
    taught("file.pth", others)  # which may be what it was trained on
    with pytest.raises(OptionError, match="class 0 is 'n01440764', the data set's 'kind 000'"):
        taught("hub", others)
    with pytest.raises(OptionError, match="class 2 is 'n01484850', the data set's '10'"):
        taught("hub", sorted(map(str, range(1000))))


def test_teacher_of_another_class_count_is_refused(tmp_path):
    save_teacher(tmp_path / "t.pth", num_classes=7)
    with pytest.raises(OptionError, match="--teacher-path: the teacher knows 7 classes"):
        build_teacher(tmp_path / "t.pth")


def test_checkpoint_of_another_model_is_refused(tmp_path):
    save_teacher(tmp_path / "t.pth")
    with pytest.raises(OptionError, match="--teacher-path"):
        build_teacher(tmp_path / "t.pth", model="resnet34")
    with pytest.raises(OptionError, match="--teacher-path"):
        build_teacher(tmp_path / "t.pth", model="regnety_002")
    with pytest.raises(OptionError, match="--teacher-path: .*does not exist"):
        build_teacher(tmp_path / "other.pth")


def test_teacher_of_other_channels_is_refused(tmp_path):
    bands = dataclasses.replace(STUDENT, mean=(0.5,) * 5, std=(0.5,) * 5)
    model = timm.create_model("resnet10t", num_classes=3, in_chans=5)
    torch.save({"model": model.state_dict(), "preprocessing": bands.to_dict()}, tmp_path / "t.pth")
    message = "--teacher-path: the teacher takes images of 5 channels, the student of 3: give"
    with pytest.raises(OptionError, match=message):
        build_teacher(tmp_path / "t.pth", model="resnet10t")


def test_unknown_teacher_names_its_own_option(tmp_path):
    with pytest.raises(OptionError, match="--teacher-model: .*resnet18") as caught:
        build_teacher(tmp_path / "t.pth", model="resnet1818")
    assert "--model" not in str(caught.value)


def test_published_teacher_must_know_the_classes():
    with pytest.raises(OptionError, match="--teacher-path: .*1000 classes, the data set has 3"):
        build_teacher("timm")


def test_published_teacher_names_the_option_that_helps(monkeypatch):
    def published(model: str, path: str = "timm", classes: int = 1000) -> None:
        options = LossOptions(distillation_type="hard", teacher_model=model, teacher_path=path)
        teachers.build_teacher(options, num_classes=classes, preprocessing=STUDENT)

    with pytest.raises(OptionError, match="--teacher-model: unknown model 'resnet1818'"):
        published("resnet1818")
    with pytest.raises(OptionError, match="--teacher-path: unknown model 'resnet1818'"):
        published("resnet18", "timm/resnet1818")
    with pytest.raises(OptionError, match="--teacher-path: no weights of deit_nano.*published"):
        published("deit_nano_patch4_32")
    with pytest.raises(OptionError, match="--teacher-path: no weights of deit_nano.*published"):
        published("deit_nano_patch4_32", classes=3)

    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", unreachable)
    with pytest.raises(OptionError, match="--teacher-path: .*use --teacher-path FILE"):
        published("resnet18")
