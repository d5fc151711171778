"""tools.tune: the space, trials that are pruned, shared, killed, stopped and gone on with.

Most tests put a script in the place of main.py that writes the log of a training without training:
its accuracy is known, and it starts at once.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from PIL import Image
from runs import PATIENCE

import main as training
from checkpointing.files import load_checkpoint
from errors import UserError
from tools import doctor, lr_find, overfit
from tools.tune import __main__ as tune
from tools.tune import processes
from tools.tune import search as search_loop
from tools.tune.space import grid_points, read_space
from tools.tune.study import STUDY

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--data-set", "DIGITS", "--model", "simple_cnn", "--input-size", "8", "--device", "cpu"),
    *("--num-workers", "0", "--no-repeated-aug", "--aa", "none", "--color-jitter", "none"),
    *("--reprob", "0", "--mixup", "0", "--cutmix", "0", "--epochs", "1", "--warmup-epochs", "0"),
    *("--batch-size", "64", "--no-tensorboard", "--no-model-ema", "--unscale-lr"),
]
# Accuracy rises with the epochs up to 100 - 10 × |log10(lr) + 3| - 100 × weight_decay.
STAND_IN = f"""
import json, math, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import yaml
from training.lock import RunLock
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(arguments["--output-dir"])
options = yaml.safe_load(Path(arguments["--config"]).read_text())
lock = RunLock(folder)


def end(number, frame):
    (folder / "ended").touch()
    lock.release()
    os._exit(128 + number)


signal.signal(signal.SIGTERM, end)
(folder / "started").write_text(json.dumps(arguments))
if os.environ.get("FAKE") == "together":
    until = time.monotonic() + {PATIENCE}
    while len(list(folder.parent.glob("trial-*/started"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    sys.exit(0 if time.monotonic() < until else 9)
if os.environ.get("FAKE") == "fail":
    print("error: --lr: not this one")
    sys.exit(2)
if os.environ.get("FAKE") == "diverge" and options["lr"] > 1e-3:
    sys.exit(3)
best = 100 - 10 * abs(math.log10(options["lr"]) + 3) - 100 * options["weight_decay"]
(folder / "best.pth").touch()
for epoch in range(options["epochs"]):
    (folder / f"checkpoint-000{{epoch}}.pth").touch()
    accuracy = best * (epoch + 1) / options["epochs"]
    with open(folder / "log.txt", "a") as log:
        log.write(json.dumps({{"epoch": epoch + 1, "test_acc1": accuracy}}) + "\\n")
        log.flush()
    if os.environ.get("FAKE") == "hang" or (accuracy < 30 and options["weight_decay"] > 0.5):
        time.sleep({PATIENCE})
lock.release()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    monkeypatch.setattr(processes, "MAIN", path)
    monkeypatch.setattr(search_loop, "POLL", 0.02)
    return path


def write_space(folder: Path, **axes) -> str:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(axes, sort_keys=False))
    return str(path)


def search(folder: Path, space: str, *more: str) -> int:
    argv = ["--space", space, "--output-dir", str(folder / "study"), "--epochs", "3"]
    return tune.main([*argv, "--warmup-epochs", "0", *more])


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(
        study_name=STUDY, storage=f"sqlite:///{folder / 'study' / 'study.db'}"
    ).trials


LR = {"low": "1e-5", "high": "1e-1", "log": True}


# --- the space ------------------------------------------------------------------------------------


def test_a_space_holds_values_of_the_options_types(tmp_path):
    path = write_space(
        tmp_path,
        **{"LR": LR, "batch-size": {"low": 16, "high": 64, "step": 16}},
        opt=["adamw", "lion"],
        aa={"choices": ["none", "trivial"]},
        scale=[[0.08, 1], [0.5, 1]],
        weight_decay={"low": 0, "high": 0.1, "step": 0.05},
    )
    lr, batch, opt, aa, scale, decay = read_space(Path(path))
    assert (lr.name, lr.low, lr.high, lr.log) == ("lr", 1e-5, 1e-1, True)
    assert opt.choices == ("adamw", "lion") and aa.choices == (None, "trivial")
    drawn = optuna.trial.FixedTrial(
        {"lr": 1e-3, "batch_size": 32, "aa": "null", "scale": "[0.5, 1.0]", "weight_decay": 0.05}
    )
    values = [axis.draw(drawn) for axis in (lr, batch, aa, scale, decay)]
    assert values == [1e-3, 32, None, [0.5, 1.0], 0.05]
    assert [type(v) for v in values[:2]] == [float, int]
    assert batch.grid() == [16, 32, 48, 64] and decay.grid() == pytest.approx([0, 0.05, 0.1])
    with pytest.raises(UserError, match="lr: --sampler grid needs choices, or a step"):
        lr.grid()
    with pytest.raises(UserError, match="a grid of 100001 values, 100,000 at most"):
        replace(decay, step=1e-6).grid()
    with pytest.raises(UserError, match="100,000 at most: raise its step"):
        replace(decay, high=1e300, step=1e-300).grid()
    with pytest.raises(UserError, match="a grid of 502,002,501 points, 100,000 at most"):
        next(grid_points([replace(decay, step=1e-4 / n) for n in (0.5, 1, 1)]))


@pytest.mark.parametrize(
    "axes, words",
    (
        ({"zzz": [1]}, "unknown option 'zzz'"),
        ({"smoothin": [1]}, "did you mean smoothing"),
        ({"output_dir": ["a"]}, "output_dir is no part of a recipe"),
        ({"lr": {"low": 1, "high": 0.1}}, "lr: low must be below high"),
        ({"lr": {"low": 0, "high": 0.1, "log": True}}, "lr: log needs a low above 0"),
        ({"lr": {"low": 0}}, "lr: a range needs low and high"),
        ({"lr": {"from": 0}}, "lr: expected choices"),
        ({"lr": {"choices": [1], "low": 0}}, "lr: expected choices"),
        ({"lr": {"low": -1, "high": 1}}, "--lr: must be at least 0"),
        ({"lr": ["fast"]}, "--lr: expected float, got 'fast'"),
        ({"opt": {"low": 0, "high": 1}}, "opt: str has no range"),
        ({"lr": []}, "lr: choices must be a list"),
        ({"lr": [1], "LR": [2]}, "an option is there twice"),
        ({"warmup_epochs": [0, 7]}, "--warmup-epochs: 7 leaves nothing of --epochs 3"),
    ),
)
def test_a_wrong_space_is_refused(stand_in, tmp_path, capsys, axes, words):
    assert search(tmp_path, write_space(tmp_path, **axes)) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "study").exists()


# --- the search -----------------------------------------------------------------------------------


def test_search_finds_the_best_and_writes_it(stand_in, tmp_path, capsys):
    space = write_space(tmp_path, lr=LR, weight_decay=[0.0, 0.1])
    base = tmp_path / "base.yaml"
    base.write_text("model: simple_cnn\nsmoothing: 0.05\n")
    more = ("--config", str(base), "--pruner", "none", "--input-size", "32")
    assert search(tmp_path, space, "--trials", "12", *more) == 0
    done = trials(tmp_path)
    assert [t.state.name for t in done] == ["COMPLETE"] * 12
    for trial in done:
        decay = json.loads(trial.params["weight_decay"])
        lr = float(f"{trial.params['lr']:.6g}")
        want = 100 - 10 * abs(np.log10(lr) + 3) - 100 * decay
        assert trial.value == pytest.approx(want)
        assert trial.intermediate_values == pytest.approx({i: want * i / 3 for i in (1, 2, 3)})
    best = max(done, key=lambda t: t.value)
    recipe = training.load_config(["--config", str(tmp_path / "study" / "best.yaml")])
    assert recipe.optim.lr == pytest.approx(best.params["lr"], rel=1e-5)
    assert recipe.optim.weight_decay == json.loads(best.params["weight_decay"])
    assert (recipe.loss.smoothing, recipe.model.input_size, recipe.run.epochs) == (0.05, 32, 3)
    # The recipe is what that trial was trained with.
    folder = tmp_path / "study" / f"trial-{best.number:04d}"
    used = training.load_config(["--config", str(folder / "options.yaml")])
    assert used.recipe() == recipe.recipe()
    assert f"best: trial {best.number}" in capsys.readouterr().out
    assert sorted(p.name for p in folder.glob("*.pth")) == ["best.pth"]
    for name in ("history.png", "importance.png"):
        image = Image.open(tmp_path / "study" / name)
        assert image.size[0] > 500 and len(image.convert("L").getcolors()) > 10


def test_a_pruned_training_gets_sigterm_and_is_entered(stand_in, tmp_path):
    """Trials of weight_decay 0.9 hang after their first epoch, far below the median."""
    space = write_space(tmp_path, weight_decay=[0.0, 0.9], lr=[3e-3, 2e-3, 1e-3])
    assert search(tmp_path, space, "--sampler", "grid", "--prune-after", "1") == 0
    done = trials(tmp_path)
    assert sorted(t.params["weight_decay"] for t in done) == ["0.0"] * 3 + ["0.9"] * 3
    for trial in done:
        pruned = trial.params["weight_decay"] == "0.9"
        assert trial.state.name == ("PRUNED" if pruned else "COMPLETE")
        folder = tmp_path / "study" / f"trial-{trial.number:04d}"
        assert (folder / "ended").exists() == pruned
        assert list(folder.glob("*.pth")) == ([] if pruned else [folder / "best.pth"])


def test_a_study_goes_on_where_it_stopped(stand_in, tmp_path, capsys):
    space = write_space(tmp_path, lr=LR)
    assert search(tmp_path, space, "--trials", "2", "--pruner", "hyperband") == 0
    assert search(tmp_path, space, "--trials", "4") == 0
    assert len({t.params["lr"] for t in trials(tmp_path)}) == 4
    capsys.readouterr()
    assert search(tmp_path, space, "--trials", "4") == 0
    assert "trial 4" not in capsys.readouterr().out and len(trials(tmp_path)) == 4
    other = write_space(tmp_path, lr={**LR, "high": 0.5})
    assert search(tmp_path, other, "--trials", "9") == 2
    assert "holds a study of another space" in capsys.readouterr().err


def test_grid_tries_every_point_once(stand_in, tmp_path):
    space = write_space(
        tmp_path, weight_decay={"low": 0.0, "high": 0.2, "step": 0.1}, lr=[1e-4, 1e-3]
    )
    more = ("--sampler", "grid", "--pruner", "none", "--jobs", "2")
    assert search(tmp_path, space, "--trials", "4", *more) == 0
    assert search(tmp_path, space, *more) == 0
    done = [t for t in trials(tmp_path) if t.state.name == "COMPLETE"]
    points = {(round(t.params["weight_decay"], 6), t.params["lr"]) for t in done}
    assert points == {(d, lr) for d in (0.0, 0.1, 0.2) for lr in ("0.0001", "0.001")}
    assert len(trials(tmp_path)) == 6


def test_jobs_run_at_the_same_time_on_their_devices(stand_in, tmp_path, monkeypatch):
    """Each training waits for another one to have started; none logs, so that none counts."""
    monkeypatch.setenv("FAKE", "together")
    space = write_space(tmp_path, lr=LR)
    assert search(tmp_path, space, "--jobs", "2", "--devices", "cpu", "cuda:1") == 2
    given = [
        json.loads(path.read_text())["--device"]
        for path in sorted((tmp_path / "study").glob("trial-*/started"))
    ]
    assert sorted(given[:2]) == ["cpu", "cuda:1"]
    ends = {t.user_attrs["end"].partition(":")[0] for t in trials(tmp_path)}
    assert ends == {"failed with code 0"}


def tuner(folder: Path, stand_in: Path, space: str, *more: str, fake: str = "") -> subprocess.Popen:
    """tools.tune in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from tools.tune import __main__, processes, search; "
        f"search.POLL = 0.02; processes.MAIN = Path({str(stand_in)!r}); "
        "sys.exit(__main__.main(sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", code, "--space", space, "--output-dir", str(folder / "study")]
    return subprocess.Popen(
        [*argv, "--epochs", "3", "--warmup-epochs", "0", *more],
        cwd=ROOT,
        env=os.environ | {"FAKE": fake},
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, what: str) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def test_processes_share_a_study(stand_in, tmp_path):
    space = write_space(tmp_path, lr=LR)
    both = [tuner(tmp_path, stand_in, space, "--trials", "5") for _ in range(2)]
    said = [process.communicate(timeout=PATIENCE)[0] for process in both]
    assert [p.returncode for p in both] == [0, 0]
    done = trials(tmp_path)
    assert [t.number for t in done] == list(range(5))
    assert {t.state.name for t in done} <= {"COMPLETE", "PRUNED"}
    assert len({t.params["lr"] for t in done}) == 5
    mine = [set(re.findall(r"^trial (\d+): lr", text, re.M)) for text in said]
    assert not mine[0] & mine[1] and len(mine[0] | mine[1]) == 5


def test_what_a_killed_search_left_is_failed_and_ended(stand_in, tmp_path, capsys):
    space = write_space(tmp_path, lr=LR)
    process = tuner(tmp_path, stand_in, space, fake="hang")
    folder = tmp_path / "study" / "trial-0000"
    wait_for((folder / "log.txt").exists, "the first trial doesn't start")
    process.kill()
    process.communicate()
    assert [t.state.name for t in trials(tmp_path)] == ["RUNNING"]
    assert search(tmp_path, space, "--trials", "2") == 0
    assert [t.state.name for t in trials(tmp_path)] == ["FAIL", "COMPLETE", "COMPLETE"]
    wait_for((folder / "ended").exists, "its training goes on")
    assert "trial 0: left by a process that is gone" in capsys.readouterr().out


def test_a_damaged_study_is_refused(tmp_path, capsys):
    space = write_space(tmp_path, lr=LR)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.db").write_bytes(b"SQLite format 3\0" + b"x" * 4096)
    assert search(tmp_path, space, "--trials", "2") == 2
    assert "study.db can't be read as a study" in capsys.readouterr().err


def test_a_running_search_is_left_alone(stand_in, tmp_path):
    space = write_space(tmp_path, lr=LR)
    process = tuner(tmp_path, stand_in, space, fake="hang")
    folder = tmp_path / "study" / "trial-0000"
    wait_for((folder / "log.txt").exists, "the first trial doesn't start")
    assert search(tmp_path, space, "--trials", "2") == 0
    assert [t.state.name for t in trials(tmp_path)] == ["RUNNING", "COMPLETE"]
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 128 + signal.SIGTERM and "goes on with the study" in said
    assert (folder / "ended").exists()
    assert [t.state.name for t in trials(tmp_path)] == ["FAIL", "COMPLETE"]


def test_failures_end_the_search_with_their_reason(stand_in, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FAKE", "fail")
    assert search(tmp_path, write_space(tmp_path, lr=LR)) == 2
    captured = capsys.readouterr()
    assert "3 trials in a row failed" in captured.err
    assert "failed with code 2: error: --lr: not this one" in captured.out
    assert [t.state.name for t in trials(tmp_path)] == ["FAIL"] * 3


def test_diverging_is_a_result_and_no_failure(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "diverge")
    space = write_space(tmp_path, lr=[1e-4, 1e-3, 1e-2, 1e-1, 0.2, 0.3])
    assert search(tmp_path, space, "--sampler", "grid", "--pruner", "none") == 0
    states = {json.loads(t.params["lr"]): t.state.name for t in trials(tmp_path)}
    assert states == {
        lr: "COMPLETE" if lr <= 1e-3 else "PRUNED" for lr in (1e-4, 1e-3, 1e-2, 0.1, 0.2, 0.3)
    }


def test_a_loss_is_to_be_small(stand_in, tmp_path):
    """The stand-in logs no loss, so nothing counts; but the direction is kept in the study."""
    assert search(tmp_path, write_space(tmp_path, lr=LR), "--best-metric", "test_loss") == 2
    study = optuna.load_study(
        study_name=STUDY, storage=f"sqlite:///{tmp_path / 'study' / 'study.db'}"
    )
    assert study.direction.name == "MINIMIZE"


# --- for real -------------------------------------------------------------------------------------


def test_commands_of_the_page(tmp_path, monkeypatch):
    """Every command of docs/tune.md does what it should, on a tiny model.

    The last ones train a trial, and train with its recipe: the same comes out, bit by bit.
    """
    text = (ROOT / "docs" / "tune.md").read_text(encoding="utf-8")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    [space] = re.findall(r"```yaml\n(.*?)```", text, re.S)
    Path("space.yaml").write_text(space)
    blocks = re.findall(r"```sh\n(.*?)```", text.replace("\\\n", " "), re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(python main\.py [^`]+)`", text)
    tools = {"lr_find": (lr_find, ["--updates", "40"]), "doctor": (doctor, [])}
    tools |= {"overfit": (overfit, ["--lr", "3e-3"]), "tune": (tune, ["--trials", "1"])}
    ran = []
    for words in (shlex.split(line, comments=True) for line in lines):
        if words[:2] == ["python", "main.py"]:
            code = training.main([*words[2:], *TINY, "--output-dir", f"run{len(ran)}"])
        elif words[:2] == ["python", "-m"]:
            tool, more = tools[words[2].removeprefix("tools.")]
            code = tool.main([*words[3:], *TINY, *more])
        assert code == 0, words
        ran.append(words[2])
    assert {f"tools.{name}" for name in tools} <= set(ran) and len(ran) >= 6
    study = tmp_path / "output" / "tune"
    [trial] = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{study / 'study.db'}").trials
    log = json.loads((study / "trial-0000" / "log.txt").read_text())
    assert trial.state.name == "COMPLETE" and log["test_acc1"] == trial.value
    first = load_checkpoint(study / "trial-0000" / "best.pth")
    again = load_checkpoint(tmp_path / f"run{len(ran) - 1}" / "best.pth")
    assert again["config"]["lr"] == float(f"{trial.params['lr']:.6g}")
    assert all(again["model"][k].equal(v) for k, v in first["model"].items())
