"""--task multilabel from the command line to the checkpoint: runs on tiny images."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import (
    STOPPED,
    assert_same_state,
    logged,
    newest,
    run_processes,
    stopped_after,
)
from sklearn.metrics import average_precision_score, f1_score

import main
from checkpointing.files import load_checkpoint
from checkpointing.folder import newer_checkpoints
from inference import load_for_inference
from tools.data import pack

CLASSES = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """32 images of 8 pixels whose channels show their labels; some have none."""
    folder = tmp_path_factory.mktemp("several")
    rng = np.random.default_rng(0)
    rows = [("image", "labels")]
    for number in range(32):
        has = rng.random(3) < 0.4
        pixels = rng.integers(0, 120, (8, 8, 3)) + 60 * has[::-1]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        rows.append((f"{number}.png", "|".join(np.array(CLASSES)[has])))
    with open(folder / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "list.csv"


def arguments(table: Path, folder: Path, *more: str) -> list[str]:
    packed = table.is_dir()
    argv = ["--task", "multilabel", "--data-path", table, "--output-dir", folder]
    argv += ["--data-set", "raw/x"] if packed else ["--data-set", "CSV", "--val-fraction", "0.3"]
    argv += ["--model", "deit_nano_patch4_32"]
    argv += ["--input-size", "8", "--batch-size", "4", "--epochs", "2", "--num-workers", "0"]
    argv += ["--device", "cpu", "--lr", "0.01", "--log-interval", "2"]
    return [str(a) for a in (*argv, "--no-tensorboard", *more)]


def train(table: Path, folder: Path, *more: str) -> int:
    return main.main(arguments(table, folder, *more))


@pytest.fixture(scope="module")
def trained(table, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train(table, folder, "--save-every-steps", "3", "--keep", "20") == 0
    return folder


def held_out(folder: Path, ema: bool) -> tuple[np.ndarray, np.ndarray]:
    """Targets and probabilities of the images that a run validates on, one by one."""
    from config import DataOptions
    from pipeline.dataset import build_dataset

    content = load_checkpoint(folder / "best.pth")
    options = {k: content["config"][k] for k in ("task", "data_set", "data_path", "val_fraction")}
    val = build_dataset(False, DataOptions(**options), seed=content["config"]["seed"])
    model, transform, _ = load_for_inference(folder / "best.pth", ema=ema)
    with torch.no_grad():
        logits = [model(transform(val.source.open(i))[None])[0] for i in range(len(val))]
    return val.targets, torch.stack(logits).sigmoid().numpy()


@pytest.mark.parametrize("prefix", ["test", "ema"])
def test_the_log_has_scikit_learns_figures_and_the_checkpoint_the_thresholds(trained, prefix):
    content = torch.load(trained / "best.pth", weights_only=True)
    record = content["metrics"]
    assert "train_acc1" not in record and content["config"]["best_metric"] == "test_map"
    targets, likely = held_out(trained, prefix == "ema")
    mean_ap = average_precision_score(targets, likely)
    assert record[f"{prefix}_map"] == pytest.approx(100 * mean_ap, abs=1e-4)
    classifier = load_for_inference(trained / "best.pth", ema=prefix == "ema")
    assert classifier.task == "multilabel" and classifier.class_names == CLASSES
    for suffix, least in (("", 0.5), ("_best", np.array(classifier.thresholds))):
        for mean in ("micro", "macro"):
            wanted = 100 * f1_score(targets, likely >= least, average=mean, zero_division=0)
            assert record[f"{prefix}_{mean}_f1{suffix}"] == pytest.approx(wanted)


def test_the_list_is_read_once_for_both_parts(trained):
    assert (trained / "run.log").read_text().count("labels between '|'") == 1


def test_results_per_class_are_written(trained):
    with open(trained / "per_class.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:3] == ["class", "positives", "ap"] and [row[0] for row in rows] == CLASSES
    record = torch.load(trained / "best.pth", weights_only=True)["metrics"]
    shown = np.mean([float(row[2]) for row in rows])
    assert shown == pytest.approx(record["test_map"], abs=0.01)


def test_evaluation_takes_the_thresholds_of_the_checkpoint(trained, tmp_path, capsys):
    """Not those that would be best on what is evaluated."""
    content = torch.load(trained / "best.pth", weights_only=True)
    content["thresholds"] = [0.999] * 3
    torch.save(content, tmp_path / "other.pth")
    capsys.readouterr()
    assert main.main(["--eval", "--resume", str(tmp_path / "other.pth")]) == 0
    shown = capsys.readouterr().out
    metrics = content["metrics"]
    targets, likely = held_out(trained, False)
    macro = 100 * f1_score(targets, likely >= 0.999, average="macro", zero_division=0)
    assert f"model  mAP {metrics['test_map']:.3f} %" in shown
    assert f"at each class's threshold {macro:.3f} %" in shown
    assert main.main(["--eval", "--resume", str(trained / "best.pth"), "--task", "classification"])


@pytest.mark.parametrize("options", [("--cache", "none", "--augment-on", "cpu"), ()])
def test_a_run_that_was_stopped_goes_on_exactly(table, tmp_path, options):
    """Mixup and cutmix of the label vectors, one by one and by the batch of packed pixels."""
    if not options:
        data = ["--task", "multilabel", "--data-set", "CSV", "--data-path", str(table)]
        data += ["--val-fraction", "0.3", "--output-dir", str(tmp_path / "packed")]
        assert pack.main([*data, "--format", "raw"]) == 0
        table = tmp_path / "packed"
    options += ("--loss", "asl", "--pos-weight", "balanced", "--smoothing", "0.1")
    assert train(table, tmp_path / "whole", *options) == 0
    with stopped_after(8):
        assert train(table, tmp_path / "parts", *options) == STOPPED
    assert newest(tmp_path / "parts")["thresholds"]
    assert train(table, tmp_path / "parts", *options, "--resume", "auto") == 0
    whole, parts = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    assert_same_state(whole, parts)
    assert whole["thresholds"] == parts["thresholds"]
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_two_processes_evaluate_as_one(table, tmp_path, trained):
    """The same weights on images that are shared unevenly."""
    argv = ["--eval", "--resume", str(trained / "best.pth"), "--num-workers", "0"]
    codes, output = run_processes([*argv, "--output-dir", str(tmp_path)], tmp_path / "out", 2)
    assert codes == [0, 0], output
    alone, _ = run_processes([*argv, "--output-dir", str(tmp_path)], tmp_path / "alone", 1)
    assert alone == [0]
    lines = [
        [line for line in text.splitlines() if "mAP" in line]
        for text in (output, (tmp_path / "alone").read_text())
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 2


def test_two_processes_of_a_sharded_model_have_scikit_learns_figures(table, tmp_path):
    """Thirteen images, of which one process has seven; the last epoch is resumed in its middle."""
    folder = tmp_path / "run"
    argv = arguments(table, folder, "--fsdp", "--batch-size", "2", "--val-fraction", "0.4")
    argv += ["--save-every-steps", "4", "--keep", "9", "--model-kwargs", "depth=1"]
    codes, output = run_processes(argv, tmp_path / "out")
    assert codes == [0, 0], output
    whole, log = newest(folder), logged(folder)
    for later in newer_checkpoints(folder, 1, 16):
        shutil.rmtree(later)
    codes, output = run_processes([*argv, "--resume", "auto"], tmp_path / "again")
    assert codes == [0, 0] and "16 images into the next" in output, output
    again = newest(folder)
    assert_same_state(whole, again)
    assert whole["thresholds"] == again["thresholds"] and log == logged(folder)
    score = load_checkpoint(folder / "best.pth")["metrics"]["test_map"]
    targets, likely = held_out(folder, False)
    assert len(targets) == 13
    assert score / 100 == pytest.approx(average_precision_score(targets, likely), abs=1e-6)


def test_a_file_of_weights_that_is_missing_is_named(table, tmp_path, capsys):
    assert train(table, tmp_path / "run", "--pos-weight", "absent.txt") == 2
    assert "--pos-weight: absent.txt does not exist" in capsys.readouterr().err
