"""Sets whose classes are others than the model's, against timm's readers and counts by hand."""

import csv
import json
import re
from pathlib import Path

import pytest
import shades
import timm
import torch
from runs import run_processes
from safetensors.torch import save_file
from timm.data import ImageNetInfo, RealLabelsImagenet
from timm.data.readers.reader_image_folder import ReaderImageFolder

import main
from checkpointing.files import save_checkpoint
from config import DataOptions
from errors import DataError, OptionError
from pipeline.imagenet import class_names
from training.label_space import ModelClasses, label_space

IDS = ImageNetInfo().label_names()


def evaluate(weights: str, data: Path, *more: object) -> int:
    """The exit code of --eval of published weights; tables are written beside ``data``."""
    argv = ["--eval", "--resume", weights, "--data-path", data, "--output-dir", data.parent, *more]
    return main.main([*shades.OPTIONS, *map(str, argv)])


def scores(shown: str, name: str = "model") -> tuple[float, float | None]:
    """Top-1 and top-5 as a line of the log says."""
    found = re.search(rf"{name} +top-1 ([\d.]+) %(?:  top-5 ([\d.]+) %)?", shown)
    return float(found[1]), float(found[2]) if found[2] else None


def percent(right: int, count: int) -> float:
    return pytest.approx(100 * right / count, abs=5e-4)


def table(data: Path) -> list[list[str]]:
    """Rows of the per-class table: class, images, correct."""
    with open(data.parent / "eval_model_per_class.csv", newline="") as file:
        return [row[:3] for row in csv.reader(file)][1:]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return shades.weights(tmp_path_factory.mktemp("weights") / "w.pth")


# --- by names and numbers -------------------------------------------------------------------------


def test_some_of_imagenets_classes_are_found_by_their_wordnet_ids(weights, tmp_path, capsys):
    """In folders without a training part, as those of Imagenette and ImageNet-A."""
    shown = {IDS[700]: [700, 900], IDS[3]: [3, 3, 4, 0], IDS[999]: [999]}
    data = shades.images(tmp_path / "set", shown)
    assert evaluate(weights, data) == 0
    out = capsys.readouterr().out
    assert "3 classes of the set are 3 of the model's 1000, by their wordnet ids" in out
    assert "on 7 images of 3 classes" in out
    # The five first answers of shade 4 are 4, 5, 3, 6, 2; of shade 0, 0 to 4.
    assert scores(out) == (percent(4, 7), percent(6, 7))
    assert table(data) == [[IDS[3], "4", "2"], [IDS[700], "2", "1"], [IDS[999], "1", "1"]]


def test_folders_named_by_numbers_are_not_sorted_as_text(tmp_path, capsys):
    """ImageNet-V2's form, with timm's order."""
    data = shades.images(tmp_path / "set", {str(i): [i] for i in range(12)})
    assert evaluate(shades.weights(tmp_path / "w.pth", 12), data) == 0
    out = capsys.readouterr().out
    assert "by their names, which are taken as class indices" in out
    assert scores(out) == (100.0, 100.0)
    assert ReaderImageFolder(str(data)).class_to_idx == {str(i): i for i in range(12)}


def test_a_checkpoint_finds_some_of_its_classes_by_name(tmp_path, capsys):
    """With a training part of fewer classes, which the model's list does not open."""
    content = {
        "config": {"model": "shades", "data_set": "IMNET"},
        "class_names": ["ant", "bee", "cat", "dog"],
        "preprocessing": {
            "input_size": 8,
            "crop_ratio": 1.0,
            "interpolation": "bicubic",
            "mean": [0.0] * 3,
            "std": [1.0] * 3,
        },
        "model": shades.Shades(4).state_dict(),
        "model_ema": {k: torch.zeros_like(v) for k, v in shades.Shades(4).state_dict().items()},
    }
    save_checkpoint(tmp_path / "c.pth", content)
    for part in ("train", "val"):
        shades.images(tmp_path / "set" / part, {"cat": [2, 2, 1], "bee": [1]})
    argv = ["--eval", "--resume", tmp_path / "c.pth", "--data-path", tmp_path / "set"]
    argv = [*map(str, argv), "--output-dir", str(tmp_path), "--num-workers", "0"]
    assert main.main(argv) == 0
    out = capsys.readouterr().out
    assert "2 classes of the set are 2 of the model's 4, by their names" in out
    assert scores(out) == (percent(3, 4), None) and scores(out, "EMA") == (0.0, None)
    assert table(tmp_path / "set") == [["bee", "1", "1"], ["cat", "3", "2"]]
    # Other names need a file; two classes of the set may be one of the model.
    shades.images(tmp_path / "other", {"lion": [2], "tiger": [2, 3], "wasp": [1]})
    (tmp_path / "map.json").write_text(json.dumps({"lion": "cat", "tiger": 2, "wasp": "bee"}))
    argv[4] = str(tmp_path / "other")
    assert main.main([*argv, "--class-map", str(tmp_path / "map.json")]) == 0
    out = capsys.readouterr().out
    assert "3 classes of the set are 2 of the model's 4, by --class-map" in out
    assert scores(out) == (percent(3, 4), None)
    assert table(tmp_path / "set") == [["cat", "3", "2"], ["bee", "1", "1"]]


# --- by files -------------------------------------------------------------------------------------


def test_a_class_map_is_timms(weights, tmp_path, capsys):
    """A list of names whose lines are the indices, with more names than folders."""
    data = shades.images(tmp_path / "set", {"hen": [2, 0], "eel": [1], "owl": [4]})
    (tmp_path / "map.txt").write_text("ant\neel\nhen\nfox\nowl\n")
    samples = ReaderImageFolder(str(data), class_map=str(tmp_path / "map.txt")).samples
    colours = [2, 0, 1, 4]  # of images 1, 2 …
    right = sum(colours[int(Path(path).stem) - 1] == target for path, target in samples)
    assert evaluate(weights, data, "--class-map", tmp_path / "map.txt") == 0
    out = capsys.readouterr().out
    assert right == 3 and scores(out) == (percent(right, 4), 100.0)
    assert table(data) == [[IDS[1], "1", "1"], [IDS[2], "2", "1"], [IDS[4], "1", "1"]]
    # Two classes of the set may be one; where the model's have no names, the set's are shown.
    (tmp_path / "map.txt").write_text("eel 2\nhen 2\nowl 4\n")
    few = shades.weights(tmp_path / "few.pth", 5)
    assert evaluate(few, data, "--class-map", tmp_path / "map.txt") == 0
    assert scores(capsys.readouterr().out) == (percent(2, 4), 100.0)
    assert table(data) == [["eel+hen", "3", "1"], ["owl", "1", "1"]]


@pytest.mark.parametrize("named", ["ids", "numbers", "order"])
def test_valid_labels_leave_out_the_other_logits(weights, tmp_path, capsys, named):
    """As timm's validate.py: the columns of the logits, and targets by the sorted folders."""
    valid = [3, 300, 700, 701, 702, 999]
    folders = {"ids": IDS.__getitem__, "numbers": str, "order": "class{:04d}".format}[named]
    shown = {folders(3): [3, 100, 200], folders(300): [300, 501], folders(700): [710]}
    shown |= {folders(701): [701], folders(702): [5, 703], folders(999): [900, 1]}
    data = shades.images(tmp_path / "set", shown)
    names = [IDS[i] if named == "ids" else str(i) for i in valid]
    (tmp_path / "valid.txt").write_text("\n".join(names))
    assert evaluate(weights, data, "--valid-labels", tmp_path / "valid.txt") == 0
    out = capsys.readouterr().out
    samples = ReaderImageFolder(str(data)).samples
    colours = [shade for each in shown.values() for shade in each]  # of images 1, 2 …
    logits = shades.logits([colours[int(Path(path).stem) - 1] for path, _ in samples])[:, valid]
    targets = torch.tensor([target for _, target in samples])
    top1 = int((logits.argmax(1) == targets).sum())
    top5 = int((logits.topk(5).indices == targets[:, None]).sum())
    assert 0 < top1 < top5 < len(samples)
    assert scores(out) == (percent(top1, len(samples)), percent(top5, len(samples)))
    loss = float(torch.nn.functional.cross_entropy(logits.double(), targets))
    assert float(re.search(r"loss ([\d.]+)", out)[1]) == pytest.approx(loss, rel=1e-5)
    assert "--valid-labels: 6 of 1000 logits" in out
    row = {"ids": IDS[300], "numbers": IDS[300], "order": "class0300"}[named]
    assert table(data)[1] == [row, "2", str(int((logits[3:5].argmax(1) == 1).sum()))]


REAL = [[2], [3], [4, 700], [], [3, 0], [950]]


@pytest.fixture
def validation_part(tmp_path) -> Path:
    """Six images of three classes under ImageNet's names, and real.json beside."""
    shown = {IDS[999]: [4], IDS[3]: [3, 700], IDS[700]: [1, 700, 949]}
    (tmp_path / "real.json").write_text(json.dumps(REAL))
    return shades.images(tmp_path / "val", shown, "ILSVRC2012_val_{:08d}.png")


def test_real_labels_are_timms(weights, validation_part, capsys):
    real = validation_part.parent / "real.json"
    assert evaluate(weights, validation_part, "--real-labels", real) == 0
    out = capsys.readouterr().out
    theirs = RealLabelsImagenet(
        [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 7)], real_json=real
    )
    theirs.add_result(shades.logits([4, 3, 700, 1, 700, 949]))  # images 1 to 6
    assert scores(out, "ReaL") == (
        pytest.approx(theirs.get_accuracy(1), abs=5e-4),
        pytest.approx(theirs.get_accuracy(5), abs=5e-4),
    )
    # Right are 3 of the second, 700 of the third; 2 and 950 are among five answers.
    assert scores(out, "ReaL") == (40.0, 80.0)
    assert "(5 images with labels)" in out
    assert scores(out) == (percent(2, 6), percent(2, 6))


def test_real_labels_of_some_logits(weights, validation_part, capsys):
    """Classes that are left out can't be answered."""
    folder = validation_part.parent
    (folder / "valid.txt").write_text("3\n700\n999\n950\n4\n")
    argv = ["--real-labels", folder / "real.json", "--valid-labels", folder / "valid.txt"]
    assert evaluate(weights, validation_part, *argv) == 0
    out = capsys.readouterr().out
    # Answers 4, 3, 700, 3, 700, 950 of those five; the first's one label is none of them.
    assert scores(out, "ReaL") == (60.0, 80.0) and scores(out) == (percent(2, 6), 100.0)


def test_two_processes_see_each_image_once(weights, validation_part, capsys, tmp_path):
    """More processes than images of a class, and an odd share: the lines are those of one."""
    folder = validation_part.parent
    (folder / "valid.txt").write_text("3\n700\n999\n950\n4\n2\n0\n")
    (validation_part / IDS[3] / "ILSVRC2012_val_00000007.png").write_bytes(
        (validation_part / IDS[3] / "ILSVRC2012_val_00000002.png").read_bytes()
    )
    (folder / "real.json").write_text(json.dumps([*REAL, [3]]))
    argv = ["--eval", "--resume", weights, "--data-path", validation_part, "--output-dir", folder]
    argv += ["--real-labels", folder / "real.json", "--valid-labels", folder / "valid.txt"]
    argv = [*shades.OPTIONS, *map(str, argv)]
    assert main.main(argv) == 0
    alone, rows = capsys.readouterr().out, table(validation_part)
    for more in ((), ("--no-dist-eval",)):
        codes, together = run_processes([*argv, *more], tmp_path / f"log{len(more)}.txt")
        assert codes == [0, 0], together
        for name in ("model", "ReaL"):
            [line] = re.findall(rf"^ *{name} .*top-1.*$", alone, re.M)
            assert re.findall(rf"^ *{name} .*top-1.*$", together, re.M) == [line]
        assert table(validation_part) == rows
    assert "(6 images with labels)" in together


def test_published_weights_that_name_their_classes(tmp_path, capsys):
    """A folder in timm's hub form: its names are compared, not counted."""
    model = timm.create_model("resnet10t", num_classes=3)
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "resnet10t", "num_classes": 3, "label_names": ["eel", "hen", "owl"]}
    config["pretrained_cfg"] = {"num_classes": 3, "input_size": [3, 32, 32], "classifier": "fc"}
    (folder / "config.json").write_text(json.dumps(config))
    argv = ["--eval", "--pretrained", "--model", f"local-dir:{folder}", "--device", "cpu"]
    argv += ["--num-workers", "0", "--output-dir", str(tmp_path), "--data-path"]
    data = shades.images(tmp_path / "set", {"owl": [900, 3], "hen": [40]})
    (tmp_path / "valid.txt").write_text("owl\nhen\n")
    for more in ((), ("--valid-labels", str(tmp_path / "valid.txt"))):
        assert main.main([*argv, str(data), *more]) == 0
    assert "2 classes of the set are 2 of the model's 3, by their names" in capsys.readouterr().out
    assert [row[:2] for row in table(data)] == [["hen", "1"], ["owl", "2"]]
    shades.images(tmp_path / "other", {"owl": [9], "hen": [4], "elk": [1]})
    assert main.main([*argv, str(tmp_path / "other")]) == 2
    error = refused(capsys.readouterr().err)
    assert "(elk, hen, owl) are not those of the model (eel, hen, owl), which has no elk: " in error


# --- refusals -------------------------------------------------------------------------------------


def refused(out: str) -> str:
    """The one line of an error."""
    assert out.startswith("error: ") and out.count("\n") == 1
    return out


def test_a_head_for_other_classes_is_refused(weights, tmp_path, capsys):
    data = shades.images(tmp_path / "set", {"hen": [2], "eel": [1]})
    assert evaluate(weights, data) == 2
    error = refused(capsys.readouterr().err)
    assert error.startswith(f"error: --resume: {weights} knows 1000 classes, {data} has 2 classes:")
    assert "without --eval" in error and "--class-map FILE or --valid-labels FILE" in error
    argv = ["--eval", "--finetune", weights, "--data-set", "DIGITS", "--output-dir", str(tmp_path)]
    assert main.main([*shades.OPTIONS, *argv]) == 2
    error = refused(capsys.readouterr().err)
    assert error.startswith(f"error: --finetune: {weights} knows 1000 classes, DIGITS has 10")
    argv = ["--eval", "--pretrained", "--data-set", "DIGITS", "--output-dir", str(tmp_path)]
    assert main.main([*argv, "--model", "resnet18", "--device", "cpu"]) == 2
    error = refused(capsys.readouterr().err)
    assert "--pretrained: what is published as resnet18 knows 1000 classes, DIGITS has 10" in error
    assert main.main([*argv, "--model", "vit_small_patch16_224.dino", "--device", "cpu"]) == 2
    assert "has no classifier: train one first" in refused(capsys.readouterr().err)
    assert main.main([*argv, "--model", "simple_cnn", "--device", "cpu"]) == 2
    assert "no weights of simple_cnn are published" in refused(capsys.readouterr().err)


def test_a_set_of_as_many_classes_goes_on_where_nothing_is_known(tmp_path, capsys):
    data = shades.images(tmp_path / "set", {"hen": [1], "eel": [0]})
    assert evaluate(shades.weights(tmp_path / "w.pth", 2), data) == 0
    out = capsys.readouterr().out
    assert "by their order (of the names of the model's classes nothing is known)" in out
    assert scores(out) == (100.0, None)


@pytest.mark.parametrize(
    "option, content, message",
    [
        ("--class-map", "hen 2\n", "file.txt has no line for 'eel' of"),
        ("--class-map", "hen 2\neel 1000\n", "line 2: the model has no class 1000, but 0 to 999"),
        ("--class-map", "hen 2\neels 1\n", "did you mean eels?"),
        ("--valid-labels", "1\n2\n5\n", "file.txt names 3 classes, "),
        ("--valid-labels", "1\nn0144376\n", "line 2: the model has no class 'n0144376': did you"),
    ],
)
def test_files_that_do_not_fit_are_refused(weights, tmp_path, capsys, option, content, message):
    data = shades.images(tmp_path / "set", {"eel": [1], "hen": [2]})
    (tmp_path / "file.txt").write_text(content)
    assert evaluate(weights, data, option, tmp_path / "file.txt") == 2
    error = refused(capsys.readouterr().err)
    assert error.startswith(f"error: {option}: ") and message in error


@pytest.mark.parametrize(
    "content, name, message",
    [
        ("[[1]]", "ILSVRC2012_val_{:08d}.png", "has the labels of 1 images, the set has 2"),
        ("[[1], [2]]", "{}.png", "is for images named ILSVRC2012_val_00000001 to 00000002, "),
        ("[[1], [2]]", "ILSVRC2012_val_1000000{}.png", "1.png is none: evaluate ImageNet's"),
        ("[[1], [2]]", "ILSVRC2012_val_{:08d}0.png", "10.png is none: evaluate ImageNet's"),
        ("[[1], [2]]", "ILSVRC2012_val_00000001.png", "have one number: remove one"),
    ],
)
def test_real_labels_of_other_images_are_refused(tmp_path, capsys, content, name, message):
    data = shades.images(tmp_path / "set", {"0": [0], "1": [1], "2": []}, name)
    (tmp_path / "real.json").write_text(content)
    weights = shades.weights(tmp_path / "w.pth", 3)
    assert evaluate(weights, data, "--real-labels", tmp_path / "real.json") == 2
    error = refused(capsys.readouterr().err)
    assert error.startswith("error: --real-labels: ") and message in error


def space(names, count=1000, known=None, **files):
    model = ModelClasses.of("resume", "w.pth", count, known)
    return label_space(names, model, DataOptions(data_path="set", **files))


def test_all_of_imagenets_classes_in_another_order_or_by_number():
    assert space(IDS).targets == list(range(1000)) and not space(IDS).note
    assert space(IDS[::-1]).targets == list(range(1000))[::-1]
    numbers = sorted(map(str, range(1000)))
    assert space(numbers).targets == [int(n) for n in numbers]
    assert space(numbers).names[:2] == [IDS[0], IDS[1]]
    assert space(numbers, known=IDS[::-1]).targets == [int(n) for n in numbers]
    words = [f"word {i:03d}" for i in range(1000)]
    for known in (None, ["crane"] * 1000):  # of unknown weights these may be the classes
        assert space(words, known=known).targets == list(range(1000))
        assert space(words, known=known).names == words


def test_imagenets_classes_by_english_names():
    """Sorted as folders are, they have another order than the model's outputs."""
    names = sorted(class_names(1000))
    wanted = [class_names(1000).index(name) for name in names]
    for known in (None, class_names(1000)):
        found = space(names, known=known)
        assert found.targets == wanted and "by the names that ImageNet has" in found.note
    described = ImageNetInfo("imagenet-1k").label_descriptions()
    several = ("crane", "cardigan")
    words = [
        id_ if text in several else text.upper().replace(" ", "_")
        for id_, text in zip(IDS, described, strict=True)
    ]
    assert space(words).targets == list(range(1000))
    both = [f"{id_}_{text}" for id_, text in zip(IDS, described, strict=True)]
    assert space(both).targets == list(range(1000))
    assert space(["n01443537-goldfish", "n01440764 tench"]).targets == [1, 0]


def test_names_that_are_known_to_differ_are_refused():
    with pytest.raises(DataError, match=r"1 of 1000 classes are none of .* \(n99999999\): remove"):
        space([*IDS[:-1], "n99999999"])
    with pytest.raises(DataError, match=r"1 of 1000 classes are none .*\(misc\)"):
        space([*IDS[:-1], "misc"])
    with pytest.raises(DataError, match=r"1000 of 1000 classes are none"):
        space([f"n9{i:07d}" for i in range(1000)])
    words = [f"word {i}" for i in range(1000)]
    with pytest.raises(DataError, match=r"1000 of 1000 .* none of ImageNet's .*\(word 0, "):
        space(words, known=class_names(1000))
    # "crane" is a bird and a machine, "cardigan" a dog and a jacket.
    names = [*(name for name in class_names(1000) if not name.startswith("crane")), "crane", "x"]
    with pytest.raises(
        DataError, match=r"4 of 1000 .* several \(Cardigan, cardigan, crane, …\): --"
    ):
        space(names)
    with pytest.raises(DataError, match=r"\(a, c\) are not those of the model \(a, b\)"):
        space(["a", "c"], 2, ["a", "b"])
    with pytest.raises(DataError, match=r"which has no 0, 1: --class-map"):
        space(["0", "1"], 2, ["a", "b"])
    with pytest.raises(OptionError, match=r"named 1 … 12: are they in the order of the numbers"):
        space(sorted(map(str, range(1, 13))), 12)
    assert space([f"{i:02d}" for i in range(1, 13)], 12).targets == list(range(12))


def test_a_class_that_valid_labels_leave_out_is_named(tmp_path):
    (tmp_path / "v.txt").write_text("3\n5\n")
    with pytest.raises(OptionError, match=f"leaves out class 7, which images of '{IDS[7]}' show"):
        space([IDS[3], IDS[7]], valid_labels=str(tmp_path / "v.txt"))
