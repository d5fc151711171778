"""What a run says of the time before it, and of few images."""

import logging
import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import PLAIN, train

import config
import models
from architectures.summary import ModelSummary
from optimization.freezing import Freezer
from pipeline.dataset import build_parts
from training.outlook import (
    FEW_IMAGES,
    TimeToGo,
    few_images,
    finetuning_command,
    large_images,
    lost_levels,
    rest_of_run,
    seconds_to_go,
)

FOLDER = Path("output/of mine")


class Images:
    """A data set of which only the number of images and classes counts."""

    def __init__(self, images: int, classes: int) -> None:
        self.images, self.classes = images, range(classes)

    def __len__(self) -> int:
        return self.images


def built(name: str, size: int = 224) -> torch.nn.Module:
    with torch.device("meta"):
        return models.build_model(name, 3, input_size=size)


@pytest.mark.parametrize(
    "name, images, classes, recipe, learns",
    [
        ("deit_small", 60, 3, "frozen", "head."),
        ("deit_small", 3680, 37, "gradual", "head. norm."),
        ("deit_tiny", 3680, 37, "gradual", "head. norm."),
        ("deit_small", 9000, 3, "layerwise", ""),
        ("resnet18", 60, 3, "frozen", "fc."),
        ("resnet18", 3680, 37, "gradual", "fc."),
        ("convnext_atto", 3680, 37, "gradual", "head.fc."),
        ("deit_tiny_distilled", 60, 3, "frozen", "head. head_dist."),
        ("cait_xxs24_224", 3680, 37, "gradual", "head."),
        ("swin_tiny_patch4_window7_224", 9000, 3, "layerwise", ""),
    ],
)
def test_the_command_is_the_recipe_for_so_many_images(name, images, classes, recipe, learns):
    """Its options are accepted, and what learns first is the model's head."""
    given = config.load(["--model", name, "--data-path", "my pets", "--val-fraction", "0.2"])
    model = built(name)
    command = finetuning_command(given, Images(images, classes), model, FOLDER)
    assert f"configs/finetune_{recipe}.yaml" in command
    words = shlex.split(command)
    assert words[:2] == ["python", "main.py"]
    options = config.load(words[2:])
    assert models.resolve_name(options.model.model) == models.resolve_name(name)
    assert options.model.pretrained and options.data.data_path == "my pets"
    assert options.data.val_fraction == 0.2
    assert options.data.batch_size == min(64, images)
    assert options.run.output_dir == "output/of mine-finetuned"
    freezer = Freezer(model, freeze=options.model.freeze, unfreeze_at=options.model.unfreeze_at)
    freezer.apply(0)
    free = {key.rpartition(".")[0] + "." for key, p in model.named_parameters() if p.requires_grad}
    if learns:
        assert free == set(learns.split())
    freezer.apply(20)
    assert all(p.requires_grad for p in model.parameters()) is (recipe != "frozen")


def test_the_command_reads_a_list_as_the_run_does():
    """Each option of a CSV file is passed on."""
    words = ["--data-set", "CSV", "--data-path", "a.csv", "--image-root", "my images"]
    words += ["--image-column", "id", "--label-column", "breed", "--split-column", "none"]
    words += ["--background", "drop"]
    command = finetuning_command(config.load(words), Images(60, 3), built("deit_small"), FOLDER)
    assert " ".join(shlex.split(command)).find(" ".join(words[:4])) > 0
    data = config.load(shlex.split(command)[2:]).data
    assert (data.image_root, data.image_column, data.label_column) == ("my images", "id", "breed")
    assert (data.split_column, data.background) == ("none", "drop")


@pytest.mark.parametrize(
    "images, words, left_out",
    [
        (60, ["--in-chans", "5", "--mean", "0.1", "0.2", "0.3", "0.4", "0.5"], True),
        (3680, ["--in-chans", "1", "--bit-depth", "16"], True),
        (3680, ["--in-chans", "1"], False),
    ],
)
def test_the_command_fits_images_of_other_kinds(images, words, left_out):
    """Recipes that alter colours are taken without that."""
    given = config.load(["--data-path", "fields", *words])
    command = finetuning_command(given, Images(images, 37), built("deit_small"), FOLDER)
    found = config.load(shlex.split(command)[2:])
    assert found.model.in_chans == given.model.in_chans
    assert found.data.bit_depth == given.data.bit_depth
    assert found.data.mean == given.data.mean
    assert (found.augment.aa is None) is left_out


def test_a_model_without_published_weights_gives_way_to_that_of_the_recipe():
    given = config.load(["--model", "simple_cnn", "--data-set", "CIFAR10", "--batch-size", "16"])
    model = models.build_model("simple_cnn", 3, input_size=32)
    words = shlex.split(finetuning_command(given, Images(500, 10), model, FOLDER))
    options = config.load(words[2:])
    assert options.model.model == "deit_small_patch16_224"
    assert options.data.data_set == "CIFAR10" and options.data.batch_size == 16

    given = config.load(["--model", "nest_tiny", "--data-path", "pets"])
    text = few_images(given, Images(500, 10), model, FOLDER)
    assert "nest_tiny from scratch; from the weights of deit_small_patch16_224 it takes" in text


@pytest.mark.parametrize(
    "options, images, said",
    [
        ((), FEW_IMAGES - 1, True),
        ((), FEW_IMAGES, False),
        (("--pretrained",), 100, False),
        (("--finetune", "best.pth"), 100, False),
        (("--overfit-batches", "1"), 100, False),
        (("--input-size", "32"), 100, False),
    ],
)
def test_it_is_said_of_few_images_and_nothing_to_start_from(options, images, said):
    given = config.load(["--model", "resnet18", "--data-path", "pets", *options])
    text = few_images(given, Images(images, 10), built("resnet18"), FOLDER)
    assert bool(text) is said
    if said:
        assert text.startswith(f"{images} images are few to train resnet18 from scratch")
        command = finetuning_command(given, Images(images, 10), built("resnet18"), FOLDER)
        assert text.endswith(f": {command}")


def test_a_run_says_it_at_its_start_and_not_when_it_goes_on(images, tmp_path, capsys):
    options = ("--model", "test_resnet", "--input-size", "96", "--epochs", "2", *PLAIN)
    assert train(images, tmp_path / "run", *options, "--stop-at-epoch", "1") == 0
    said = "".join(capsys.readouterr())
    assert said.count("are few to train test_resnet from scratch") == 1
    assert "configs/finetune_frozen.yaml --model test_resnet" in said
    assert train(images, tmp_path / "run", *options, "--resume", "auto") == 0
    assert "are few to train" not in "".join(capsys.readouterr())


def test_that_levels_are_lost_is_said_by_a_run_and_its_doctor(tmp_path, capsys):
    said = "warning: images of more than 8 bits per channel are read as 8: --bit-depth 16"
    for name, count in (("a", 6), ("b", 6)):
        (tmp_path / "x-rays" / name).mkdir(parents=True)
        for number in range(count):
            levels = np.full((12, 12), 4000 * number, dtype=np.uint16)
            Image.fromarray(levels).save(tmp_path / "x-rays" / name / f"{number}.png")
    options = ("--model", "test_resnet", "--input-size", "32", "--val-fraction", "0.5", *PLAIN)
    assert train(tmp_path / "x-rays", tmp_path / "run", *options) == 0
    assert "".join(capsys.readouterr()).count(said) == 1
    argv = ["--data-path", str(tmp_path / "x-rays"), "--val-fraction", "0.5"]
    for more, told in (((), True), (("--bit-depth", "16", "--in-chans", "1"), False)):
        given = config.load([*argv, *more])
        assert bool(lost_levels(given, build_parts(given.data, seed=0)[0])) is told


# --- large images ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Class folders of 20 files of 12 megapixels, and of as many of 640×480."""
    root = tmp_path_factory.mktemp("photographs")
    for kind, size in (("large", (4000, 3000)), ("usual", (640, 480))):
        first = root / f"{kind}.jpg"
        Image.new("RGB", size).save(first)
        for name in "ab":
            (root / kind / name).mkdir(parents=True)
            for number in range(10):
                os.link(first, root / kind / name / f"{number}.jpg")
    return root


def hint(photographs: Path, *options: str, kind: str = "large", seconds: float | None = None):
    argv = ["--data-path", str(photographs / kind), "--val-fraction", "0.2", "--epochs", "5000"]
    given = config.load([*argv, *options])
    train, _ = build_parts(given.data, seed=0)
    loader = SimpleNamespace(cached="ram" in options)
    sampler = SimpleNamespace(num_samples=len(train))
    data = SimpleNamespace(train=train, train_loader=loader, sampler=sampler)
    return large_images(given, data, seconds)


def test_of_images_far_larger_than_the_crop_it_is_said_what_spares_decoding(photographs):
    text = hint(photographs)
    # 37 ms of 12 megapixels; 16 images are trained on.
    assert text.startswith(
        "images are 4000×3000 on average, the crop is 224: decoding takes about 37 ms each, 27 "
        f"images/s per core; --cache disk (about {16 * 256 * 256 * 4 / 3 * 3 / 1e9:.2g} GB) or `"
    )
    assert text.endswith("` brings about 3,300")
    words = shlex.split(text.split("`")[1])
    assert words[:4] == ["python", "-m", "tools.data", "pack"]
    assert words[words.index("--short-side") + 1] == "256"
    assert config.load(words[4:-4]).data.data_path == str(photographs / "large")
    assert "takes about 1e+02 ms each, 10 images" in hint(photographs, "--jpeg-scaling", "off")
    assert "takes about 50 ms each, 20 images/s" in hint(photographs, seconds=0.05)
    # 150 µs each and 150 µs for the pixels of a side of 256, which are 2.25 times as many here.
    assert hint(photographs, "--cache-side", "384").endswith("about 2,100")
    # A small image is not read for nothing.
    assert hint(photographs, "--input-size", "32").endswith("about 6,500")


@pytest.mark.parametrize(
    "kind, options",
    [
        ("usual", ()),  # nearly as fast as they could be
        ("large", ("--epochs", "900")),  # 16 × 900 × 37 ms are less than 10 minutes
        ("large", ("--cache", "ram")),
        ("large", ("--overfit-batches", "1")),
    ],
)
def test_it_is_not_said_where_it_does_not_matter(photographs, kind, options):
    assert hint(photographs, *options, kind=kind) == ""


def test_of_large_bands_it_is_said_too(tmp_path):
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(4):
            np.save(tmp_path / "set" / name / f"{number}.npy", np.zeros((700, 800, 5), np.uint16))
    options = ("--in-chans", "5", "--bit-depth", "16", "--input-size", "56")
    text = hint(tmp_path, *options, kind="set", seconds=0.1)
    assert text.startswith("images are 800×700 on average, the crop is 56: decoding takes about 1")
    # Six images of 64×73 pixels of 10 bytes; the words that pack takes.
    assert f"(about {6 * 64 * 64 * 8 / 7 * 10 / 1e9:.2g} GB)" in text
    words = shlex.split(text.split("`")[1])
    assert words[words.index("--in-chans") :][:4] == ["--in-chans", "5", "--bit-depth", "16"]
    assert text.endswith("spares most of that")


def test_a_run_says_it_once(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.outlook.WORTH_SAYING", 0)
    monkeypatch.setattr("training.outlook.LARGE", 0)
    options = ("--epochs", "1", "--warmup-epochs", "0", "--cache", "none")
    assert train(images, tmp_path / "run", *options) == 0
    assert "".join(capsys.readouterr()).count("images are 14×12 on average") == 1


# --- time -----------------------------------------------------------------------------------------


def parts(*options: str, ema: bool = False) -> SimpleNamespace:
    """Ten batches of 4 images make an epoch of this run; there are 30 validation images in batches
    of 6."""

    class Loader:
        batch_size = 6

        def __len__(self) -> int:
            return 5

    given = config.load(["--epochs", "8", "--batch-size", "4", *options])
    return SimpleNamespace(
        config=given,
        data=SimpleNamespace(
            val_loader=Loader(),
            updates_per_epoch=lambda config: 10 // config.optim.accum_steps,
        ),
        state=SimpleNamespace(
            progress=SimpleNamespace(epoch=0, step=0, update=0), ema=object() if ema else None
        ),
        settings=SimpleNamespace(batch_size=4),
    )


@pytest.mark.parametrize(
    "options, ema, epoch, step, seconds",
    [
        # Epochs × 10 updates of 2 s; 30 images × 2 s / 4 / 3 for an evaluation.
        ((), False, 0, 0, 8 * 20 + 8 * 5),
        ((), True, 0, 0, 8 * 20 + 8 * 10),
        ((), False, 6, 5, 1.5 * 20 + 2 * 5),
        (("--stop-at-epoch", "3"), False, 0, 0, 3 * 20 + 3 * 5),
        (("--cooldown-epochs", "2"), False, 0, 0, 10 * 20 + 10 * 5),
        (("--accum-steps", "2"), False, 0, 4, 8 * 10 - 4 + 8 * 2.5),
        (("--val-interval", "3"), False, 0, 0, 8 * 20 + 3 * 5),  # after 3, 6 and 8
        (("--val-interval", "3"), True, 6, 0, 2 * 20 + 10),
    ],
)
def test_time_to_go(options, ema, epoch, step, seconds):
    run = parts(*options, ema=ema)
    run.state.progress.epoch, run.state.progress.step = epoch, step
    assert seconds_to_go(run, 2.0) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "options, done, seconds, rest",
    [
        ((), 1, 25.0, 7 * 25.0),
        (("--val-interval", "3"), 1, 20.0, 7 * 20.0 + 3 * 5.0),  # 20 s without a validation
        (("--val-interval", "3"), 3, 25.0, 5 * 20.0 + 2 * 5.0),
    ],
)
def test_rest_of_a_run_by_its_last_epoch(options, done, seconds, rest):
    run = parts(*options)
    run.state.progress.epoch = done
    assert rest_of_run(run, seconds) == pytest.approx(rest)


def test_smaller_training_images_count_less():
    """Two of eight epochs at a quarter of the work: updates of 1 s there take 4 s later."""
    run = parts("--train-sizes", "112:0", "224:2")
    run.summary = ModelSummary(1, 400)
    run.summaries = {(112, 112): ModelSummary(1, 100), (224, 224): run.summary}
    run.state.progress.step = 5
    evaluations = 8 * 30 * 4.0 / 4 / 3  # of 30 images, a third of what training takes
    assert seconds_to_go(run, 1.0) == pytest.approx(15 * 1.0 + 60 * 4.0 + evaluations)
    run.state.progress.epoch = 1
    assert rest_of_run(run, 10 * 1.0 + 10.0) == pytest.approx(20.0 + 6 * (40.0 + 10.0))
    run.state.progress.epoch = 3
    assert rest_of_run(run, 40.0 + 10.0) == pytest.approx(5 * 50.0)


@pytest.mark.parametrize(
    "seconds, updates, said",
    [
        (4.0, 9, "about 3 min 04 s to go, 4 s per update"),
        (0.5, 9, None),  # the end of the epoch comes first, and says it
        (100.0, 1, None),
    ],
)
def test_it_is_said_once_and_early(monkeypatch, caplog, seconds, updates, said):
    run, now = parts("--stop-at-epoch", "4"), [50.0]
    monkeypatch.setattr("training.outlook.time.monotonic", lambda: now[0])
    time_to_go = TimeToGo(run)
    caplog.set_level(logging.INFO)
    progress = run.state.progress
    for epoch in range(2):
        for _ in range(updates):
            now[0] += seconds
            progress.update += 1
            progress.step = (progress.step + 1) % updates
            time_to_go.after_update()
        progress.epoch = epoch + 1
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (said is not None)
    if said:
        # 36 updates, and four evaluations of 30 images at a third of 1 s.
        assert said in lines[0]


def test_time_to_go_is_measured_anew_after_a_rollback(monkeypatch, caplog):
    run, now = parts("--stop-at-epoch", "4"), [50.0]
    monkeypatch.setattr("training.outlook.time.monotonic", lambda: now[0])
    time_to_go = TimeToGo(run)
    caplog.set_level(logging.INFO)
    progress = run.state.progress
    for update in (1, 2, 3, 1, 2, 3, 4):  # back to the beginning after the third
        now[0] += 4.0
        progress.update = progress.step = update
        time_to_go.after_update()
    [line] = [record.getMessage() for record in caplog.records]
    assert "4 s per update" in line
