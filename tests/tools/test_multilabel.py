"""What the tools make of a model that finds any number of labels on an image.

Also of tools/common/labels.py.
"""

import csv
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from after_training import train
from serving import metrics, predict, request, running
from sklearn import metrics as sk
from tiny_images import COLOURS, tiny_image

from checkpointing.files import load_checkpoint
from config import DataOptions
from errors import OptionError
from inference import load_for_inference
from optimization.multilabel import probabilities
from pipeline.dataset import build_dataset
from tools import average, explain, export, report
from tools import predict as predict_tool
from tools.common import labels
from tools.common.answers import Answers
from tools.data import explore, pack, split
from tools.multilabel import co_occurrence, figures
from tools.serve import drift

NAMES = list(COLOURS)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """24 training and 12 validation images, each half and half of two colours, one or none."""
    root = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 12)):
        rows = ["path,labels"]
        for i in range(count):
            shown = [name for name in NAMES if rng.random() < 0.4][:2]
            halves = [COLOURS[name] for name in shown] + [(0, 0, 0)] * (2 - len(shown))
            image = tiny_image(halves[0], (16, 16), i)
            image.paste(tiny_image(halves[1], (8, 16), i), (8, 0))
            image.save(root / f"{part}{i}.png")
            rows.append(f"{part}{i}.png,{'|'.join(shown)}")
        (root / f"{part}.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def checkpoint(scenes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    options = ("--task", "multilabel", "--data-set", "CSV", "--label-separator", "|")
    return train(scenes, folder, *options, "--keep", "9")


def targets_of(scenes: Path, part: str = "val") -> np.ndarray:
    """(N, 3) of 0 and 1, read by hand."""
    rows = list(csv.DictReader((scenes / f"{part}.csv").read_text().splitlines()))
    return np.array([[name in row["labels"].split("|") for name in NAMES] for row in rows])


def shares_of(checkpoint: Path, scenes: Path, *, ema: bool = False) -> np.ndarray:
    """(N, 3) sigmoids of the validation images, by hand."""
    model, transform, names = load_for_inference(checkpoint, ema=ema)
    assert names == NAMES
    paths = [scenes / f"val{i}.png" for i in range(12)]
    with torch.no_grad():
        return torch.cat([torch.sigmoid(model(transform(p)[None])) for p in paths]).numpy()


def run(tool, *argv, workers: bool = True) -> int:
    more = ("--num-workers", "0") if workers else ()
    return tool.main([str(a) for a in (*argv, "--device", "cpu", *more)])


# --- figures --------------------------------------------------------------------------------------


def test_figures_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    targets = (rng.random((300, 5)) < (0.5, 0.3, 0.1, 0.05, 0.0)).astype(np.uint8)
    # Coarse scores: ties have to be taken together.
    shares = np.clip(0.4 * targets + rng.random((300, 5)) * 0.7, 0, 1).round(2).astype(np.float32)
    thresholds = np.array([0.3, 0.4, 0.5, 0.6, 0.5])
    answers = Answers(shares, targets, np.arange(300), [], 1.0, 1.0)
    found = figures.figures(answers, thresholds, list("abcde"))
    there = slice(0, 4)  # class e has no image: it is left out of the means
    labels = shares >= thresholds
    wanted = {
        "map": sk.average_precision_score(targets[:, there], shares[:, there]),
        "micro_f1": sk.f1_score(targets, shares >= 0.5, average="micro"),
        "macro_f1": sk.f1_score(targets[:, there], shares[:, there] >= 0.5, average="macro"),
        "micro_f1_at_thresholds": sk.f1_score(targets, labels, average="micro"),
        "macro_f1_at_thresholds": sk.f1_score(targets[:, there], labels[:, there], average="macro"),
        "exact_match": sk.accuracy_score(targets, labels),
        "hamming_loss": sk.hamming_loss(targets, labels),
    }
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, abs=1e-12)
    exact = torch.from_numpy(shares).double().clamp(1e-30, 1 - 1e-16)
    loss = torch.nn.functional.binary_cross_entropy(exact, torch.from_numpy(targets).double())
    assert found["log_loss"] == pytest.approx(float(loss), rel=0.02)
    each = sk.precision_recall_fscore_support(targets, labels, zero_division=0)
    for index, row in enumerate(found["per_class"]):
        assert (row["precision"], row["recall"], row["f1"]) == tuple(x[index] for x in each[:3])
        if row["images"]:
            tried = [
                sk.f1_score(targets[:, index], shares[:, index] >= t) for t in np.unique(shares)
            ]
            assert row["best_f1"] == pytest.approx(max(tried))
    assert found["per_class"][4]["average_precision"] is None


def test_hardest_images_and_confused_labels():
    targets = np.array([[1, 0, 0], [1, 0, 0], [0, 0, 1]], np.uint8)
    shares = np.array([[0.4, 0.6, 0], [0.1, 0.9, 0], [0, 0, 0.9]], np.float32)
    answers = Answers(shares, targets, np.array([5, 6, 7]), [], 1.0, 1.0)
    half = np.full(3, 0.5)
    hardest = figures.hardest(answers, half, ["cat", "dog", "owl"], 9)
    assert [image["index"] for image in hardest] == [6, 5]
    assert list(hardest[0]["missed"]) == ["cat"] and list(hardest[0]["wrong"]) == ["dog"]
    confused = figures.confused(targets > 0, shares >= half, ["cat", "dog", "owl"])
    assert confused == [{"missed": "cat", "found": "dog", "images": 2}]


def test_the_report_is_of_the_log(checkpoint, scenes, tmp_path, capsys):
    assert run(report, checkpoint, "--output", tmp_path) == 0
    content = json.loads((tmp_path / "report.json").read_text())
    last = json.loads((checkpoint.parent / "log.txt").read_text().splitlines()[-1])
    for key in ("map", "micro_f1", "macro_f1"):
        assert content[key] == pytest.approx(last[f"test_{key}"] / 100)
    for kind in ("micro", "macro"):
        best = last[f"test_{kind}_f1_best"] / 100
        assert content[f"{kind}_f1_at_thresholds"] == pytest.approx(best)
    assert content["log_loss"] == pytest.approx(last["test_loss"], abs=1e-5)
    assert content["labels_per_image"]["true"] == np.bincount(targets_of(scenes).sum(1)).tolist()
    rows = list(csv.DictReader((tmp_path / "classes.csv").read_text().splitlines()))
    thresholds = load_checkpoint(checkpoint)["thresholds"]
    assert [float(row["threshold"]) for row in rows] == pytest.approx(thresholds)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == len(content["hardest"]) > 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "mean average precision" in capsys.readouterr().out


# --- answers --------------------------------------------------------------------------------------


def test_predict_gives_all_labels_that_reach_their_thresholds(checkpoint, scenes, capsys):
    shares = shares_of(checkpoint, scenes)
    thresholds = np.array(load_checkpoint(checkpoint)["thresholds"])
    images = [scenes / f"val{i}.png" for i in range(12)]

    def ask(*more):
        capsys.readouterr()
        assert run(predict_tool, checkpoint, *images, *more, workers=False) == 0
        return capsys.readouterr().out

    for answer, row in zip(json.loads(ask("--format", "json")), shares, strict=True):
        wanted = [NAMES[k] for k in np.argsort(-row) if row[k] >= thresholds[k]]
        assert answer["labels"] == [p["class"] for p in answer["predictions"]] == wanted
        given = [p["confidence"] for p in answer["predictions"]]
        assert given == pytest.approx(sorted(row[row >= thresholds])[::-1], abs=1e-5)
    rows = list(csv.DictReader(io.StringIO(ask("--format", "csv", "--threshold", "1"))))
    assert [(r["rank"], r["class"]) for r in rows] == [("0", "")] * 12  # no image is lost
    assert "no label  (" in ask("--threshold", "1", "--topk", "1")
    rows = list(csv.DictReader(io.StringIO(ask("--format", "csv", "--topk", "2"))))
    assert len(rows) == 24
    there = [float(r["confidence"]) >= float(r["threshold"]) for r in rows]
    assert [r["present"] == "1" for r in rows] == there


def test_a_probability_on_its_threshold_is_a_label(checkpoint, scenes):
    """Training chooses thresholds in float64."""
    classifier = load_for_inference(checkpoint)
    for i in range(6):
        path = str(scenes / f"val{i}.png")
        with torch.no_grad():
            logits = classifier.model(classifier.transform(path)[None])[0]
        thresholds = probabilities(logits.numpy())
        assert thresholds.dtype == np.float64
        [answer] = predict_tool.predict(
            classifier, [path], device=torch.device("cpu"), thresholds=thresholds
        )
        assert sorted(answer.classes) == sorted(NAMES) and all(answer.present())


def test_a_threshold_is_for_several_labels(checkpoint, scenes, capsys):
    for value in ("1.5", "nan"):
        argv = (checkpoint, scenes / "val0.png", "--threshold", value)
        assert run(predict_tool, *argv, workers=False) == 2
        assert capsys.readouterr().err.startswith("error: --threshold: ")


def test_explain_draws_a_map_for_each_label(checkpoint, scenes, tmp_path):
    image = scenes / "val0.png"
    shares = shares_of(checkpoint, scenes)[0]
    found = (shares >= np.array(load_checkpoint(checkpoint)["thresholds"])).sum()
    assert run(explain, checkpoint, image, "--output", tmp_path / "all", workers=False) == 0
    assert len(list((tmp_path / "all").glob("*.png"))) == max(1, found)
    argv = (checkpoint, image, "--class", "blue", "--output", tmp_path / "one")
    assert run(explain, *argv, workers=False) == 0
    assert len(list((tmp_path / "one").glob("*.png"))) == 1


def test_exports_carry_task_and_thresholds(checkpoint, scenes, tmp_path, capsys):
    argv = (checkpoint, "--output", tmp_path, "--format", "onnx", "safetensors", "hub")
    assert run(export, *argv) == 0
    assert "mAP" in capsys.readouterr().out
    own = load_checkpoint(checkpoint)["thresholds"]
    for suffix in ("onnx", "safetensors", "hub"):
        path = tmp_path / f"{checkpoint.stem}.{suffix}"
        classifier = load_for_inference(path)
        assert (classifier.task, list(classifier.thresholds)) == ("multilabel", own)
        wanted = shares_of(checkpoint, scenes)
        assert shares_of(path, scenes) == pytest.approx(wanted, abs=1e-4)
    config = json.loads((tmp_path / f"{checkpoint.stem}.hub" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    card = (tmp_path / f"{checkpoint.stem}.hub" / "README.md").read_text()
    assert "multi-label-classification" in card and f"| amber | {own[0]:.3f} |" in card
    metadata = onnx.load(tmp_path / f"{checkpoint.stem}.onnx").metadata_props
    assert json.loads({x.key: x.value for x in metadata}["config"])["task"] == "multilabel"
    # The file alone says that its labels are several.
    data = ("--data-path", scenes, "--data-set", "CSV", "--output", tmp_path)
    assert run(report, tmp_path / f"{checkpoint.stem}.onnx", *data) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["map"] == pytest.approx(sk.average_precision_score(targets_of(scenes), wanted))


def test_the_average_is_exported_with_its_own_thresholds(checkpoint, tmp_path):
    argv = (checkpoint, "--ema", "--output", tmp_path, "--format", "safetensors")
    assert run(export, *argv) == 0
    content = load_checkpoint(checkpoint)
    assert content["ema_thresholds"] != content["thresholds"]
    found = load_for_inference(tmp_path / f"{checkpoint.stem}.safetensors").thresholds
    assert list(found) == content["ema_thresholds"]


def test_the_mean_of_checkpoints_has_thresholds_of_its_own(checkpoint, scenes, tmp_path):
    output = tmp_path / "mean.pth"
    assert run(average, checkpoint.parent, "--best", "2", "--output", output) == 0
    shares, targets = shares_of(output, scenes), targets_of(scenes)
    for index, threshold in enumerate(load_checkpoint(output)["thresholds"]):
        share, true = shares[:, index], targets[:, index]
        best = max(sk.f1_score(true, share >= t) for t in share)
        assert sk.f1_score(true, share >= threshold) == pytest.approx(best)


# --- the service ----------------------------------------------------------------------------------


def test_the_service_answers_with_labels(checkpoint, scenes, tmp_path):
    shares = shares_of(checkpoint, scenes)
    thresholds = np.array(load_checkpoint(checkpoint)["thresholds"])
    assert run(report, checkpoint, "--output", tmp_path) == 0
    reference = drift.Reference.read(tmp_path / "report.json", NAMES, several=True)
    assert reference.answers == 12
    with running(checkpoint, monitor=drift.DriftMonitor(reference, 12)) as (_, port):
        assert request(port, "GET", "/health")[2]["task"] == "multilabel"
        for i, row in enumerate(shares):
            _, _, content = predict(port, (scenes / f"val{i}.png").read_bytes())
            [entry] = content["images"]
            wanted = [NAMES[k] for k in np.argsort(-row) if row[k] >= thresholds[k]]
            assert entry["labels"] == wanted
            given = {p["class"]: p["confidence"] for p in entry["predictions"]}
            assert given == pytest.approx(dict(zip(NAMES, row.tolist(), strict=True)), abs=1e-5)
        description = request(port, "GET", "/openapi.json")[2]
        found = metrics(port)
    answer = description["paths"]["/predict"]["post"]["responses"]["200"]["content"]
    entry = answer["application/json"]["schema"]["properties"]["images"]["items"]
    assert entry["properties"]["labels"]["type"] == "array"
    there = (shares >= thresholds).sum(0)
    for name, count in zip(NAMES, there, strict=True):
        assert found.get(("serve_answers_total", name), 0) == count
        assert found["serve_drift_label_rate", name, "window"] == pytest.approx(count / 12)
        assert found["serve_drift_label_rate", name, "reference"] == pytest.approx(count / 12)
    assert found["serve_labels_sum",] == there.sum()
    assert found["serve_drift_class_psi",] == pytest.approx(0, abs=1e-9)


def test_drift_of_a_label_is_that_of_the_formula():
    before, now = np.array([10.0, 50.0]), np.array([30.0, 50.0])
    found = drift.label_indices(before, 100, now, 100)
    p, q = np.array([10.5, 90.5]) / 101, np.array([30.5, 70.5]) / 101
    assert found == pytest.approx([float(((p - q) * np.log(p / q)).sum()), 0.0])


def test_labels_warn_as_seldom_as_is_promised():
    rng = np.random.default_rng(0)
    rates, warned = np.full(80, 0.1), 0
    for _ in range(200):
        reference = drift.Reference(
            rng.binomial(1000, rates).astype(float), np.array([1000.0]), several=True
        )
        most, _ = drift.limits(reference, 200)
        seen = rng.binomial(200, rates).astype(float)
        warned += drift.label_indices(reference.classes, 1000, seen, 200).max() > most
    assert warned <= 4


# --- data sets ------------------------------------------------------------------------------------


def test_explore_counts_what_comes_together(scenes, tmp_path):
    options = ("--task", "multilabel", "--data-set", "CSV", "--label-separator", "|")
    argv = ["--data-path", str(scenes), "--output-dir", str(tmp_path), *options]
    assert explore.main(argv) == 0
    content = json.loads((tmp_path / "report.json").read_text())
    targets = targets_of(scenes, "train").astype(int)
    train_part = content["labels"]["train"]
    assert train_part["co_occurrence"] == (targets.T @ targets).tolist()
    assert train_part["per_image"] == np.bincount(targets.sum(1)).tolist()
    counts = dict(zip(NAMES, targets.sum(0).tolist(), strict=True))
    assert content["parts"]["train"]["classes"] == counts
    assert "Labels that come together" in (tmp_path / "report.html").read_text()


def test_pairs_are_compared_with_chance():
    found = co_occurrence.label_report([(0, 1), (0, 1), (0,), ()], ["a", "b", "c"])
    [pair] = found["pairs"]
    assert pair == {"labels": ["a", "b"], "images": 2, "share": 1.0, "lift": 2 * 4 / (3 * 2)}


def test_shards_hold_all_labels(scenes, tmp_path, capsys):
    options = ["--task", "multilabel", "--data-set", "CSV", "--label-separator", "|"]
    argv = ["--data-path", str(scenes), "--output-dir", str(tmp_path / "packed"), *options]
    assert pack.main(argv) == 0
    assert "--task multilabel --data-set wds/packed" in capsys.readouterr().out
    data = DataOptions(task="multilabel", data_set="wds/packed", data_path=str(tmp_path / "packed"))
    for part in ("train", "val"):
        dataset = build_dataset(part == "train", data, seed=0)
        assert dataset.classes == NAMES
        assert np.array_equal(dataset.targets, targets_of(scenes, part))
        assert len(list((tmp_path / "packed").glob(f"{part}*.index.npz"))) >= 1
    with pytest.raises(OptionError, match="--task: .* add --task multilabel"):
        build_dataset(True, dataclasses.replace(data, task="classification"), seed=0)
    raw = str(tmp_path / "raw")
    assert pack.main([*argv[:2], "--output-dir", raw, *options, "--format", "raw"]) == 0
    data = DataOptions(task="multilabel", data_set="raw/x", data_path=raw)
    for part in ("train", "val"):
        dataset = build_dataset(part == "train", data, seed=0)
        assert dataset.classes == NAMES
        assert np.array_equal(dataset.targets, targets_of(scenes, part))


def test_a_split_gives_each_label_its_share(scenes, tmp_path, capsys):
    rows = (scenes / "train.csv").read_text().splitlines()
    table = scenes / "all.csv"
    table.write_text("\n".join(rows) + "\n")
    options = ["--task", "multilabel", "--label-separator", "|", "--val", "0.25"]
    argv = [str(table), "--output-dir", str(tmp_path / "split"), *options]
    assert split.main(argv) == 0
    table.unlink()
    assert "--task multilabel --data-set CSV" in capsys.readouterr().out
    data = DataOptions(task="multilabel", data_set="CSV", data_path=str(tmp_path / "split"))
    parts = [build_dataset(is_train, data, seed=0) for is_train in (True, False)]
    assert parts[0].classes == NAMES
    both = np.concatenate([part.targets for part in parts])
    wanted = targets_of(scenes, "train")
    assert sorted(both.tolist()) == sorted(wanted.astype(int).tolist())
    for count, held_out in zip(wanted.sum(0), parts[1].targets.sum(0), strict=True):
        assert abs(held_out - count / 4) <= 1


def test_folds_keep_groups_whole(scenes, tmp_path, capsys, caplog):
    """Also where their column is named like a label."""
    caplog.set_level("INFO", "pipeline")
    header, *rows = (scenes / "train.csv").read_text().splitlines()
    table, binary = scenes / "grouped.csv", scenes / "binary.csv"
    lines = (f"{row},s{i // 4}" for i, row in enumerate(rows))
    again = f"train0.png,{'|'.join(NAMES)},s0"
    table.write_text("\n".join([f"{header},{NAMES[0]}", *lines, again]) + "\n")
    binary.write_text("path,a,b\n" + "".join(f"train{i}.png,{i % 2},1\n" for i in range(24)))
    argv = ["--task", "multilabel", "--folds", "3", "--output-dir", str(tmp_path / "folds")]
    assert split.main([str(table), *argv, "--group-by", NAMES[0]]) == 0
    out = capsys.readouterr().out
    assert "1 images are listed more than once, 1 of them with different labels" in out
    assert "main.py --task multilabel --data-set CSV --data-path" in out
    assert sum("labels between '|'" in record.getMessage() for record in caplog.records) == 1
    validated = []
    for number in (1, 2, 3):
        parts = []
        for part in ("train", "val"):
            path = tmp_path / "folds" / f"fold-{number}" / f"{part}.csv"
            names = [Path(row["path"]).stem for row in csv.DictReader(path.open())]
            parts.append([int(name.removeprefix("train")) for name in names])
        assert len(parts[0] + parts[1]) == 25
        assert not {i // 4 for i in parts[0]} & {i // 4 for i in parts[1]}
        validated += parts[1]
    assert sorted(validated) == [0, *range(24)]
    argv[-1] = str(tmp_path / "binary")
    assert split.main([str(binary), *argv, "--group-by", "A"]) == 2
    assert capsys.readouterr().err.startswith("error: --label-columns: the column 'A' would be")
    assert split.main([str(binary), *argv, "--group-by", "A", "--label-columns", "b"]) == 2
    assert "2 groups are too few for 3 parts" in capsys.readouterr().err
    for path in (table, binary):
        path.unlink()


def test_folds_of_groups_share_out_each_label():
    rng = np.random.default_rng(0)
    targets = (rng.random((240, 4)) < [0.5, 0.3, 0.2, 0.1]).astype(np.uint8)
    groups = np.arange(240) // 4
    for owner in (None, groups):
        found = split.folds_of(targets, owner, 4, seed=0)
        assert np.array_equal(np.sort(np.concatenate([val for _, val, _ in found])), np.arange(240))
        for learnt, val, moved in found:
            assert not moved and not set(learnt) & set(val)
            wanted = targets.sum(0) / 4
            assert (np.abs(targets[val].sum(0) - wanted) <= (1 if owner is None else 3)).all()
            if owner is not None:
                assert not set(owner[learnt]) & set(owner[val])


@pytest.mark.parametrize("count", [1, 4, 50, 2000])
def test_the_likeliest_are_the_first_of_all_in_order(count):
    """With many equal ones, of which the first comes first."""
    rng = np.random.default_rng(count)
    for most in (None, 1, 5, 49, 3000):
        shares = rng.integers(0, 9, count).astype(np.float32) / 10
        limits = rng.random(count)
        order = sorted(range(count), key=lambda i: (-shares[i], i))
        assert labels.likeliest_first(shares, most).tolist() == order[:most]
        found = [i for i in order if shares[i] >= limits[i]]
        assert labels.found(shares, limits).tolist() == found
