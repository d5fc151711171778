"""Several processes: DDP, FSDP2 and its checkpoints, batch norm, evaluation, and what goes wrong.

The processes are forked from the tests' own, which spares each the seconds of importing torch.
"""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import engine
import main
from augment import Preprocessing
from config import AugmentOptions
from datasets import ArraySource, ImageDataset, build_loader, build_transform
from errors import CheckpointError
from inference import load_for_inference
from samplers import EvalSampler
from tools import torture

ROOT = Path(__file__).resolve().parent.parent
BASE = (
    *("--model", "deit_nano_patch4_32", "--input-size", "8", "--device", "cpu", "--epochs", "2"),
    *("--warmup-epochs", "1", "--lr", "0.01", "--no-tensorboard", "--num-workers", "0"),
)
# What is drawn for a whole batch or process would differ between 2 × B and 1 × 2B.
PLAIN = (
    *("--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--no-repeated-aug"),
    *("--log-interval", "1"),
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("parallel")
    torture.make_pictures(root)
    return root


def run(pictures: Path, folder: Path, *options: str, world: int = 2, **environment: str) -> list:
    """Exit codes of ``world`` processes, and what they printed."""
    log = folder.with_name(f"{folder.name}.out")
    argv = [*BASE, "--data-path", str(pictures), "--output-dir", str(folder), *options]
    pids = torture.start(argv, world, log, environment)
    deadline = time.monotonic() + 90
    codes = torture.wait(pids, deadline, None)
    if codes is None:
        torture.kill(pids)
    return [codes, log.read_text()]


def trained(pictures: Path, folder: Path, *options: str, world: int = 2) -> dict:
    """The newest checkpoint of a run that must end well."""
    codes, output = run(pictures, folder, *options, world=world)
    assert codes == [0] * world, output
    return checkpoint.load_latest(folder)[1]


def assert_close(left: dict, right: dict) -> None:
    for name, weight in left["model"].items():
        torch.testing.assert_close(weight, right["model"][name], rtol=1e-4, atol=1e-6, msg=name)


def log_of(folder: Path) -> list[dict]:
    lines = (folder / "log.txt").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "epoch_seconds"} for line in lines]


# --- FSDP -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("opt", ["adamw", "lamb", "sgd"])
def test_sharded_training_equals_replicated(pictures, tmp_path, opt):
    """Same weights, average and scores to rounding, with accumulation and clipping."""
    options = ("--batch-size", "2", "--accum-steps", "2", "--clip-grad", "0.5", "--opt", opt)
    whole = trained(pictures, tmp_path / "ddp", *options)
    sharded = trained(pictures, tmp_path / "fsdp", *options, "--fsdp")
    assert_close(whole, sharded)
    for name, weight in whole["model_ema"].items():
        torch.testing.assert_close(weight, sharded["model_ema"][name], rtol=1e-4, atol=1e-6)
    for left, right in zip(log_of(tmp_path / "ddp"), log_of(tmp_path / "fsdp"), strict=True):
        assert left["test_acc1"] == right["test_acc1"]
        assert left["train_loss"] == pytest.approx(right["train_loss"], rel=1e-5)
    best = load_for_inference(tmp_path / "fsdp" / "best.pth")
    x = torch.randn(2, 3, 8, 8)
    expected = load_for_inference(tmp_path / "ddp" / "best.pth").model(x)
    torch.testing.assert_close(best.model(x), expected, rtol=1e-3, atol=1e-4)


def test_sharded_run_resumes_exactly_in_mid_epoch(pictures, tmp_path):
    options = ("--batch-size", "2", "--fsdp", "--save-every-steps", "4", "--keep", "20")
    expected = trained(pictures, tmp_path / "whole", *options)
    folder = tmp_path / "parts"
    assert run(pictures, folder, *options)[0] == [0, 0]
    middle = folder / "checkpoint-0000-00000016.shards"
    for later in checkpoint.newer_in_folder(folder, 0, 16):
        later.rename(tmp_path / later.name)
    assert checkpoint.in_folder(folder)[0] == middle
    again = trained(pictures, folder, *options, "--resume", "auto")
    for part in ("model", "model_ema", "optimizer", "schedule", "progress"):
        assert torture._count(expected[part], again[part]) == 0, part
    assert log_of(folder) == log_of(tmp_path / "whole")


def test_sharded_and_plain_checkpoints_stand_for_each_other(pictures, tmp_path):
    """Two sharded processes, then one, then two sharded again, against an untouched plain run."""
    plain = ("--batch-size", "4", "--epochs", "3", "--opt", "sgd", *PLAIN)
    expected = trained(pictures, tmp_path / "plain", *plain, world=1)
    two = ("--batch-size", "2", "--epochs", "3", "--opt", "sgd", *PLAIN)
    folder = tmp_path / "mixed"
    trained(pictures, folder, *two, "--fsdp", "--stop-at-epoch", "1")
    trained(pictures, folder, *plain, "--resume", "auto", "--stop-at-epoch", "2", world=1)
    mixed = trained(pictures, folder, *two, "--fsdp", "--resume", "auto")
    assert_close(expected, mixed)
    assert [p.suffix for p in checkpoint.in_folder(folder)][:2] == [".shards", ".pth"]


@pytest.fixture(scope="module")
def sharded(pictures, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "run"
    trained(pictures, folder, "--batch-size", "4", "--fsdp", "--amp", "bf16", "--keep", "2")
    return folder


def test_a_damaged_shard_is_found_and_passed_over(pictures, sharded, tmp_path, caplog):
    newest, before = checkpoint.in_folder(sharded)
    file = newest / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    original = file.read_bytes()
    file.write_bytes(content)
    try:
        assert checkpoint.load_latest(sharded)[0] == before
        assert "__1_0.distcp is damaged" in caplog.text
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.load_file(newest)
    finally:
        file.write_bytes(original)
    assert checkpoint.load_latest(sharded)[0] == newest


class _Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["PARALLEL_TEST_TRAP"],)


def test_hostile_metadata_is_refused(sharded, tmp_path, monkeypatch):
    monkeypatch.setenv("PARALLEL_TEST_TRAP", str(tmp_path / "trap"))
    newest = checkpoint.in_folder(sharded)[0]
    metadata = newest / ".metadata"
    original = metadata.read_bytes()
    metadata.write_bytes(pickle.dumps(_Hostile()))
    try:
        # Older versions of torch lose the reason on the way.
        reason = r"posix\.mkdir; refused|can't be read: metadata is None"
        with pytest.raises(CheckpointError, match=reason):
            checkpoint.load_file(newest)
    finally:
        metadata.write_bytes(original)
    assert not (tmp_path / "trap").exists()


def test_consolidated_file_is_what_the_shards_hold(sharded, tmp_path):
    from tools import consolidate

    newest = checkpoint.in_folder(sharded)[0]
    assert consolidate.main([str(newest), str(tmp_path / "one.pth")]) == 0
    one, shards = checkpoint.load_file(tmp_path / "one.pth"), checkpoint.load_file(newest)
    assert torture._count(one, shards) == 0
    assert one["model"]["patch_embed.proj.weight"].dtype == torch.float32
    model = load_for_inference(tmp_path / "one.pth").model
    assert torch.isfinite(model(torch.zeros(1, 3, 8, 8))).all()
    assert consolidate.main([str(newest), str(tmp_path / "one.pth")]) == 2


@pytest.mark.parametrize(
    "options, names",
    [
        (("--fsdp", "--batch-size", "4"), "--fsdp: one process"),
        (("--fsdp", "--amp", "fp16"), "--amp: with --fsdp"),
        (("--fsdp", "--opt", "adafactor"), "--opt: with --fsdp"),
    ],
)
def test_what_cannot_be_sharded_is_said(pictures, tmp_path, capsys, options, names):
    argv = [*BASE, "--data-path", str(pictures), "--output-dir", str(tmp_path / "run"), *options]
    assert main.main(argv) == 2
    assert names in capsys.readouterr().err


# --- exactness ------------------------------------------------------------------------------------


def test_synchronised_batch_norm_equals_one_process_of_twice_the_batch(pictures, tmp_path):
    options = ("--model", "resnet18_cifar", "--opt", "sgd", "--no-model-ema", *PLAIN)
    one = trained(pictures, tmp_path / "one", *options, "--batch-size", "8", world=1)
    two = trained(pictures, tmp_path / "two", *options, "--batch-size", "4", "--sync-bn")
    assert_close(one, two)
    apart = trained(pictures, tmp_path / "apart", *options, "--batch-size", "4")
    with pytest.raises(AssertionError):
        assert_close(one, apart)


@pytest.mark.parametrize("repeated", ["--repeated-aug", "--no-repeated-aug"])
def test_resume_on_two_processes_is_exact(pictures, tmp_path, repeated):
    """Mixup, cutmix, erasing, RandAugment, drop path and average, stopped in mid-epoch."""
    options = ("--batch-size", "2", "--save-every-steps", "4", "--keep", "20", repeated)
    expected = trained(pictures, tmp_path / "whole", *options)
    folder = tmp_path / "parts"
    trained(pictures, folder, *options)
    for later in checkpoint.newer_in_folder(folder, 1, 16):
        later.rename(tmp_path / later.name)
    again = trained(pictures, folder, *options, "--resume", "auto")
    for part in ("model", "model_ema", "optimizer", "schedule", "progress"):
        assert torture._count(expected[part], again[part]) == 0, part
    assert log_of(folder) == log_of(tmp_path / "whole")


PLUGIN = """
import os
import numpy as np
from datasets import ArraySource, register_dataset

class Noting(ArraySource):
    def open(self, index):
        if len(self.targets) == 48:
            with open(os.environ["NOTE"], "a") as file:
                file.write(f"{index}\\n")
        return super().open(index)

@register_dataset("noting")
def noting(is_train, options, seed):
    count = 48 if is_train else 4
    images = np.random.default_rng(0).integers(0, 255, (count, 8, 8), dtype=np.uint8)
    return Noting(images, [0, 1] * (count // 2), ["even", "odd"], "noting")
"""


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_another_world_size_sees_each_picture_once(pictures, tmp_path, before, after):
    plugin = tmp_path / "noting.py"
    plugin.write_text(PLUGIN)
    note = tmp_path / "note.txt"
    options = (
        "--plugin",
        str(plugin),
        "--data-set",
        "noting",
        "--cache",
        "none",
        "--epochs",
        "2",
        *PLAIN,
    )
    options += ("--batch-size", "4", "--save-every-steps", "2", "--keep", "20")
    folder = tmp_path / "run"
    codes, output = run(pictures, folder, *options, world=before, NOTE=str(note))
    assert not any(codes), output
    middle = 16 * before
    if middle == 32:
        middle = 16
    for later in checkpoint.newer_in_folder(folder, 0, middle):
        later.rename(tmp_path / later.name)
    seen = checkpoint.load_latest(folder)[1]["progress"]["samples"]
    assert seen == middle
    first = [int(i) for i in note.read_text().split()]
    note.unlink()
    codes, output = run(
        pictures, folder, *options, "--resume", "auto", "--stop-at-epoch", "1", world=after,
        NOTE=str(note),
    )  # fmt: skip
    assert not any(codes), output
    assert "no picture of the epoch is skipped or repeated" in output
    rest = [int(i) for i in note.read_text().split()]
    # What the first session had seen up to the checkpoint: the processes' notes are interleaved.
    from samplers import ShuffleSampler

    order = ShuffleSampler(48, seed=0).order(0).tolist()
    assert sorted(order[:seen] + rest) == list(range(48))
    assert set(order[:seen]) <= set(first)


def _judge(size: int, world: int, rank: int) -> engine.Evaluation:
    """An evaluation of ``size`` pictures by a fixed random model."""
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(0, 255, (size, 8, 8), generator=generator, dtype=torch.uint8).numpy()
    targets = torch.randint(0, 7, (size,), generator=generator).tolist()
    source = ArraySource(images, targets, [str(i) for i in range(7)], "random")
    preprocessing = Preprocessing(8, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3)
    dataset = ImageDataset(source, build_transform(False, preprocessing, AugmentOptions()))
    sampler = EvalSampler(size, num_replicas=world, rank=rank)
    loader = build_loader(
        dataset, sampler, batch_size=3, num_workers=0, pin_memory=False, drop_last=False, seed=0
    )
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 7))
    options = engine.StepOptions(device=torch.device("cpu"))
    return engine.evaluate(model, loader, options, num_classes=7, batch_size=3)


def _fingerprint(result: engine.Evaluation) -> list:
    per_class = result.correct_per_class.tolist(), result.count_per_class.tolist()
    return [result.loss.hex(), result.acc1.hex(), result.acc5.hex(), result.count, *per_class]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_evaluation_is_exact_for_every_size_and_world_size(world, tmp_path):
    """Equal to one process's to the last digit, also with fewer pictures than processes."""
    sizes: list[int] = []

    @settings(max_examples=25, database=None, derandomize=True, deadline=None)
    @given(st.integers(1, 40))
    def collect(size: int) -> None:
        sizes.append(size)

    collect()
    sizes = sorted({1, world - 1, world, world + 1, 3 * world, *sizes})
    expected = [_fingerprint(_judge(size, 1, 0)) for size in sizes]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            meet = f"file://{tmp_path}/meet"
            dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
            found = [_fingerprint(_judge(size, world, rank)) for size in sizes]
            (tmp_path / f"{rank}.json").write_text(json.dumps(found))
            code = 0
        finally:
            os._exit(code)
    assert torture.wait(pids, time.monotonic() + 60, None) == [0] * world
    for rank in range(world):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == json.loads(
            json.dumps(expected)
        )


# --- what goes wrong ------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {k: str(v) for k, v in places.items()} | {"MASTER_ADDR": "127.0.0.1"}


def test_a_process_that_never_comes_is_named(pictures, tmp_path):
    port = free_port()
    began = time.monotonic()
    codes, output = run(
        pictures, tmp_path / "run", "--dist-start-timeout", "3", world=1,
        **environment(0, 3, port),
    )  # fmt: skip
    assert codes == [2], output
    assert time.monotonic() - began < 20
    assert "of 3 processes number 1, 2 did not come" in output
    assert "--world-size" in output and "Traceback" not in output


def test_a_port_in_use_is_said(pictures, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = environment(0, 2, taken.getsockname()[1])
        options = ("--dist-start-timeout", "3")
        codes, output = run(pictures, tmp_path / "run", *options, world=1, **place)
        assert codes == [2], output
        assert "the port is in use" in output and "Traceback" not in output
        # Whoever would join there finds something that is no meeting place.
        place |= {"RANK": "1", "LOCAL_RANK": "1"}
        codes, output = run(pictures, tmp_path / "other", *options, world=1, **place)
        assert codes == [2], output
        assert "process 1 of 2 can't meet the others" in output and "Traceback" not in output


def test_two_processes_of_one_number_are_an_error(pictures, tmp_path):
    place = environment(0, 2, free_port()) | {"RANK": "2"}
    codes, output = run(pictures, tmp_path / "run", world=1, **place)
    assert codes == [2] and "2 processes have no number 2" in output


@pytest.mark.parametrize(
    "body, said",
    [
        ("raise ValueError('no such card')", "process 1 failed: ValueError: no such card"),
        ("os.kill(os.getpid(), 9)", "lost contact: process 1 is gone"),
        ("import no_such_module", "process 1 failed: --plugin"),
    ],
)
def test_a_process_that_fails_at_start_ends_all_and_is_named(pictures, tmp_path, body, said):
    plugin = tmp_path / "failing.py"
    plugin.write_text(f"import os\nif os.environ['RANK'] == '1':\n    {body}\n")
    began = time.monotonic()
    codes, output = run(pictures, tmp_path / "run", "--plugin", str(plugin))
    assert time.monotonic() - began < 30
    assert codes is not None and all(codes), output
    assert f"error: {said}" in output


def test_a_process_that_dies_in_training_ends_all(pictures, tmp_path):
    plugin = tmp_path / "dying.py"
    plugin.write_text(
        "import os, engine\n"
        "original = engine._update\n"
        "def update(state, *args):\n"
        "    if os.environ['RANK'] == '1' and state.progress.update == 2:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    original(state, *args)\n"
        "engine._update = update\n"
    )
    codes, output = run(pictures, tmp_path / "run", "--batch-size", "2", "--plugin", str(plugin))
    assert sorted(codes) == [-9, 1], output
    assert "process 1 is gone" in output and "--resume auto" in output


def test_nonfinite_on_one_process_is_one_decision(pictures, tmp_path):
    """Only process 1 meets the white picture; both stop, and its layer and picture are named."""
    plugin = tmp_path / "white.py"
    plugin.write_text(
        "import os\nimport numpy as np\nimport timm\nimport torch\nfrom torch import nn\n"
        "from datasets import ArraySource, register_dataset\n"
        "class Overflow(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.where((x > 1.9).float().mean() > 0.5, x * float('inf'), x)\n"
        "@timm.models.register_model\n"
        "def overflow(pretrained=False, num_classes=2, **kwargs):\n"
        "    return nn.Sequential(nn.Flatten(), Overflow(), nn.Linear(192, num_classes))\n"
        "@register_dataset('white')\n"
        "def white(is_train, options, seed):\n"
        "    images = np.full((16, 8, 8), 30, dtype=np.uint8)\n"
        "    images[5] = 255\n"
        "    return ArraySource(images, [0, 1] * 8, ['a', 'b'], 'white')\n"
    )
    options = ("--plugin", str(plugin), "--data-set", "white", "--model", "overflow", *PLAIN)
    options += ("--batch-size", "1", "--aa", "none", "--color-jitter", "0", "--reprob", "0")
    options += ("--mean", "0.5", "--std", "0.25", "--no-model-ema", "--hflip", "0")
    options += ("--train-interpolation", "bilinear", "--on-nonfinite")
    folder = tmp_path / "stop"
    codes, output = run(pictures, folder, *options, "stop")
    assert codes == [3, 3], output
    names = [json.loads((folder / f"nonfinite-rank{r}.json").read_text()) for r in range(2)]
    guilty = next(r for r in range(2) if "white#5" in names[r]["pictures"])
    assert f"(process {guilty})" in output
    assert names[guilty]["first_nonfinite"] is not None
    assert names[1 - guilty]["first_nonfinite"] is None
    codes, output = run(pictures, tmp_path / "skip", *options, "skip")
    assert codes == [0, 0], output
    assert [r["skipped_updates"] for r in log_of(tmp_path / "skip")] == [1, 2]


def test_torchrun_restarts_and_goes_on_exactly(pictures, tmp_path):
    """A worker is killed; --max-restarts starts all again from the last step saved."""
    options = ("--batch-size", "2", "--save-every-steps", "1", "--log-interval", "1")
    expected = trained(pictures, tmp_path / "whole", *options)
    folder = tmp_path / "elastic"
    plugin = tmp_path / "dying.py"
    plugin.write_text(
        "import os, engine\n"
        "original = engine._update\n"
        "def update(state, *args):\n"
        "    first = os.environ.get('TORCHELASTIC_RESTART_COUNT') == '0'\n"
        "    if first and os.environ['RANK'] == '1' and state.progress.update == 8:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    original(state, *args)\n"
        "engine._update = update\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "1", str(ROOT / "main.py"), *BASE]
    command += ["--data-path", str(pictures), "--output-dir", str(folder), *options]
    command += ["--plugin", str(plugin)]
    place = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--resume", "auto"], cwd=ROOT, env=place, text=True, capture_output=True
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    # Six updates an epoch: the third of the second epoch was under way.
    assert "resumed" in result.stdout and "1 epochs done" in result.stdout
    again = checkpoint.load_latest(folder)[1]
    for part in ("model", "model_ema", "optimizer", "schedule", "progress"):
        assert torture._count(expected[part], again[part]) == 0, part
    assert log_of(folder) == log_of(tmp_path / "whole")


def test_restarts_without_resume_are_refused_at_once(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    argv = [*BASE, "--data-path", str(pictures), "--output-dir", str(tmp_path / "run")]
    assert main.main(argv) == 2
    assert "--resume auto" in capsys.readouterr().err
