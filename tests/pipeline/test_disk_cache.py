"""pipeline/disk_cache.py: the same pixels whatever the file holds, and what bounds it.

Also of pipeline/kept_pixels.py.
"""

import functools
import os
import shutil
from dataclasses import replace

import disks
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import image_folder

from augmentation.batch import BatchAugment
from augmentation.preprocessing import Preprocessing
from augmentation.transforms import CentreCrop, TrainTransform
from config import AugmentOptions, DataOptions
from errors import DataError, OptionError
from pipeline import kept_pixels
from pipeline.dataset import ImageDataset, build_dataset
from pipeline.decoding import decode_tensor
from pipeline.disk_cache import DiskOptions, disk_cached
from pipeline.image_file import HEADER_BYTES, ROW_BYTES, ImageFile
from pipeline.kept_pixels import estimated_bytes
from pipeline.loader import Loader, LoaderSettings
from pipeline.sources.base import ArraySource, FileSource, Source
from samplers import EvalSampler, RASampler, ShuffleSampler
from tools.data.pack import main as pack

PREPROCESSING = Preprocessing(40, 0.875, "bicubic", (0.5,) * 3, (0.2,) * 3)
SIDE = 46  # as of 40 pixels of input
GB = 10**9


@pytest.fixture
def images(tmp_path):
    """15 training and 6 validation images of 90×70 pixels."""
    return image_folder(tmp_path / "set", {"train": 5, "val": 2}, size=(90, 70), suffix=".jpg")


@pytest.fixture
def kept(tmp_path):
    return DiskOptions(str(tmp_path / "cache"), GB, SIDE)


def part_of(root, is_train=True, transform=None, **options) -> ImageDataset:
    data = DataOptions(data_path=str(root), **options)
    if transform is None:
        transform = CentreCrop(PREPROCESSING)
        if is_train:
            transform = BatchAugment(PREPROCESSING, AugmentOptions(), 3)
    return build_dataset(is_train, data, seed=3).with_transform(transform)


def loader_of(dataset, num_workers=0, sampler=None) -> Loader:
    if sampler is None:
        sampler = ShuffleSampler(len(dataset)) if dataset.is_train else EvalSampler(len(dataset))
    return Loader(dataset, sampler, LoaderSettings(batch_size=4, num_workers=num_workers))


def epoch(loader, number=0, samples=0):
    """Pixels, labels and numbers of an epoch."""
    if loader.dataset.is_train:
        loader.sampler.set_epoch(number, samples)
    batches = list(loader)
    return [torch.cat([getattr(b, f) for b in batches]) for f in ("images", "targets", "indices")]


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other)


def file_in(kept: DiskOptions) -> str:
    (name,) = os.listdir(kept.folder)
    return os.path.join(kept.folder, name)


def no_decoding(monkeypatch) -> None:
    def refuse(*_, **__):
        pytest.fail("decoded")

    monkeypatch.setattr(kept_pixels, "open_parts", refuse)
    monkeypatch.setattr(kept_pixels, "decode", refuse)


def test_crops_come_from_the_smaller_image_in_the_first_epoch_too(images, kept):
    dataset = part_of(images)
    found, _, indices = epoch(disk_cached(loader_of(dataset), kept))
    for place, (image, index) in enumerate(zip(found, indices.tolist(), strict=True)):
        whole = decode_tensor(dataset.source.open(index))
        small = torch.nn.functional.interpolate(
            whole[None], size=(SIDE, SIDE * 90 // 70), mode="bicubic", antialias=True
        )[0]
        assert torch.equal(image, dataset.transform.apply(small, 0, place))


def test_pixels_do_not_depend_on_what_is_there(images, kept, monkeypatch):
    cold = disk_cached(loader_of(part_of(images)), kept)
    want = [epoch(cold, number) for number in range(2)]
    tight = replace(kept, limit=1, folder=f"{kept.folder}-tight")
    assert_same(epoch(disk_cached(loader_of(part_of(images)), tight), 1), want[1])
    assert sum(epoch(cold, 1, 8)[0].shape[:1]) == 7
    assert_same(epoch(cold, 1, 8), [whole[8:] for whole in want[1]])
    warm = disk_cached(loader_of(part_of(images), num_workers=2), kept)
    no_decoding(monkeypatch)
    assert_same(epoch(warm, 0), want[0])
    assert_same(epoch(cold, 1), want[1])


def test_one_by_one_and_by_the_batch_share_the_images(images, kept, monkeypatch):
    epoch(disk_cached(loader_of(part_of(images)), kept))
    no_decoding(monkeypatch)
    alone = TrainTransform(PREPROCESSING, AugmentOptions(), 3)
    pixels, *_ = epoch(disk_cached(loader_of(part_of(images, transform=alone)), kept))
    assert pixels.shape == (15, 3, 40, 40) and pixels.dtype == torch.float32


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_evaluation_sees_the_pixels_of_the_originals(images, kept, monkeypatch, mode):
    transform = CentreCrop(replace(PREPROCESSING, crop_mode=mode))
    want = epoch(loader_of(part_of(images, False, transform)))
    loader = disk_cached(loader_of(part_of(images, False, transform)), kept)
    assert_same(epoch(loader), want)
    no_decoding(monkeypatch)
    assert_same(epoch(loader), want)


def test_another_way_to_make_the_pixels_has_another_file(images, kept):
    for options in (kept, replace(kept, side=50), replace(kept, side=0)):
        epoch(disk_cached(loader_of(part_of(images)), options))
    for preprocessing in (PREPROCESSING, replace(PREPROCESSING, interpolation="bilinear")):
        epoch(disk_cached(loader_of(part_of(images, False, CentreCrop(preprocessing))), kept))
    assert len(os.listdir(kept.folder)) == 5


def test_a_file_that_changed_is_decoded_anew(images, kept):
    epoch(disk_cached(loader_of(part_of(images)), kept))
    path = images / "train" / "blue" / "2.jpg"
    status = path.stat()
    Image.new("RGB", (90, 70), (1, 2, 3)).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    dataset = disk_cached(loader_of(part_of(images)), kept).dataset
    number = next(i for i in range(15) if dataset.sample_id(i) == str(path))
    want = np.full((SIDE, SIDE * 90 // 70, 3), (1, 2, 3))
    assert abs(dataset.source.open(number) - want).max() < 3
    path.unlink()
    dataset = disk_cached(loader_of(part_of(images)), kept).dataset
    assert len(dataset) == 14  # another set


def test_parts_that_are_drawn_share_a_file(tmp_path, kept, monkeypatch):
    root = image_folder(tmp_path / "set", {"": 6}, size=(90, 70), suffix=".jpg")
    options = {"val_fraction": 0.25}
    loader = disk_cached(loader_of(part_of(root, **options)), kept)
    epoch(loader)
    data = DataOptions(data_path=str(root), **options)
    other = build_dataset(True, data, seed=4).with_transform(loader.dataset.transform)
    assert not np.array_equal(other.source.indices, loader.dataset.source.source.indices)
    cached = disk_cached(loader_of(other), kept)
    file_in(kept)
    said = cached.introduction()
    share = np.isin(other.source.indices, loader.dataset.source.source.indices).mean()
    assert f" {int(100 * share)} % filled" in said


def test_damage_is_noticed_said_and_mended(images, kept):
    want = epoch(disk_cached(loader_of(part_of(images)), kept))
    loader = disk_cached(loader_of(part_of(images), num_workers=1), kept)
    path = file_in(kept)
    with open(path, "r+b") as file:
        for place in (os.path.getsize(path) - 100, HEADER_BYTES + ROW_BYTES + 5):
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 8]))
    assert_same(epoch(loader), want)
    (said,) = loader.dataset.source.news()
    assert said.startswith("disk cache: 2 times an image was damaged there")
    assert_same(epoch(loader), want)
    assert list(loader.dataset.source.news()) == []


def test_the_bound_holds_and_what_finds_no_room_is_said(images, kept, caplog):
    kept = replace(kept, limit=60_000)
    loader = disk_cached(loader_of(part_of(images), num_workers=2), kept)
    (warning,) = [r.getMessage() for r in caplog.records]
    assert "15 images need about 0.1 GB" in warning or "need about 0.1 MB" in warning
    assert "--cache-gb allows" in warning
    epoch(loader)
    assert 40_000 < os.path.getsize(file_in(kept)) <= 60_000
    filled, full = loader.dataset.source.news()
    assert " 100 %" not in filled and "--cache-gb is used up" in full


def test_files_longest_unused_make_room_but_not_those_in_use(images, kept):
    sides = (44, 45, 46)
    loaders = {s: disk_cached(loader_of(part_of(images)), replace(kept, side=s)) for s in sides}
    sizes, paths = {}, {}
    for age, (side, loader) in enumerate(loaders.items()):
        epoch(loader)
        file = loader.dataset.source.images.file
        paths[side], sizes[side] = file.path, file.size()
        os.utime(file.path, (age, age))
    del loader, file
    loaders.pop(45), loaders.pop(46)
    tight = replace(kept, side=47, limit=3 * sizes[46])
    disk_cached(loader_of(part_of(images)), tight)
    assert [path.exists() for path in paths.values()] == [True, False, True]


def test_a_full_disk_ends_writing_not_the_run(images, kept, tmp_path):
    want = [epoch(disk_cached(loader_of(part_of(images)), kept), n) for n in range(2)]
    with disks.small_disk(tmp_path / "disk", 2048) as disk:
        loader = disk_cached(
            loader_of(part_of(images), num_workers=2), replace(kept, folder=str(disk))
        )
        loader.dataset.source.images.reserve = 0  # others take it while it is filled
        disks.fill(disk, 40_000)
        assert_same(epoch(loader), want[0])
        filled, full = loader.dataset.source.news()
        assert "No space left" in full or "nearly full" in full
        assert " 0 %" not in filled and " 100 %" not in filled
        assert_same(epoch(loader, 1), want[1])
        del loader


def test_some_of_the_disk_stays_free(images, kept, tmp_path, caplog):
    with disks.small_disk(tmp_path / "disk", 64) as disk:
        loader = disk_cached(loader_of(part_of(images)), replace(kept, folder=str(disk)))
        assert "has room for" in caplog.text
        epoch(loader)
        free = os.statvfs(disk)
        assert free.f_bavail * free.f_frsize >= 4096
        assert "is nearly full" in list(loader.dataset.source.news())[1]
        del loader


def test_a_read_only_folder_is_read_and_a_new_file_refused(images, kept, tmp_path):
    with disks.small_disk(tmp_path / "disk", 2048) as disk:
        there = replace(kept, folder=str(disk))
        want = epoch(disk_cached(loader_of(part_of(images)), there))
        disks.read_only(disk)
        loader = disk_cached(loader_of(part_of(images)), there)
        assert "100 % filled" in loader.introduction()
        assert_same(epoch(loader), want)
        with pytest.raises(OptionError, match=r"--cache-dir: .*mount it for writing"):
            disk_cached(loader_of(part_of(images)), replace(there, side=50))
        del loader


def test_another_users_file_is_refused(images, kept):
    epoch(disk_cached(loader_of(part_of(images)), kept))
    if os.getuid():
        pytest.skip("giving a file away needs root")
    os.chown(file_in(kept), 12345, 12345)
    with pytest.raises(OptionError, match="--cache-dir: .* is another user's"):
        disk_cached(loader_of(part_of(images)), kept)


def test_the_default_folder_is_this_users_alone(images, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    disk_cached(loader_of(part_of(images)), DiskOptions("", GB, SIDE))
    folder = tmp_path / "home" / "decoded-images"
    (path,) = folder.iterdir()
    assert (folder.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)


def test_unreadable_images_are_treated_as_without_a_cache(images, kept):
    (images / "train" / "amber" / "1.jpg").write_bytes(b"nothing")
    skipping = loader_of(part_of(images, on_bad_image="skip"))
    want = [batch.bad for batch in skipping]
    loader = disk_cached(loader_of(part_of(images, on_bad_image="skip")), kept)
    for _ in range(2):
        assert [batch.bad for batch in loader] == want
    with pytest.raises(DataError, match="amber/1.jpg.*--on-bad-image skip"):
        epoch(disk_cached(loader_of(part_of(images)), kept))


def test_repeated_augmentation_writes_each_image_once(images, kept):
    dataset = part_of(images)
    for rank in range(2):
        loader = loader_of(dataset, 2, RASampler(len(dataset), num_replicas=2, rank=rank))
        epoch(disk_cached(loader, kept))
    file = ImageFile(file_in(kept))
    rows = [file.row(number)[0] for number in np.flatnonzero(file.there())]
    ends = sorted((row.offset, row.offset + 3 * row.height * row.width) for row in rows)
    assert all(end == start for (_, end), (start, _) in zip(ends, ends[1:], strict=False))
    assert ends[-1][1] == file.size()


def test_arrays_in_memory_need_no_file(kept):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 60, 70), dtype=np.uint8)
    source = ArraySource(pixels, [0] * 6, ["one"], "arrays")
    transform = BatchAugment(PREPROCESSING, AugmentOptions(), 3)
    dataset = ImageDataset(source, transform, is_train=True)
    loader = disk_cached(loader_of(dataset), kept)
    assert min(loader.dataset.source.open(0).shape[:2]) == SIDE
    epoch(loader)
    assert not os.path.exists(kept.folder)
    assert loader.introduction() == "0 workers"


class Unlabelled(Source):
    """Labels are known when an image is read; another ``shade`` is other images."""

    targets = None
    classes = ["one", "two"]

    def __init__(self, shade: int) -> None:
        self.shade = shade

    def __len__(self) -> int:
        return 4

    def read(self, index):
        return Image.new("RGB", (80, 60), (self.shade, index, 0)), index % 2

    def sample_id(self, index):
        return f"image {index}"


def test_labels_are_kept_and_pixels_tell_sets_of_one_name_apart(kept, monkeypatch):
    transform = BatchAugment(PREPROCESSING, AugmentOptions(), 3)
    loaders = []
    for shade in (10, 10, 200):
        dataset = ImageDataset(Unlabelled(shade), transform, is_train=True)
        loaders.append(disk_cached(loader_of(dataset), kept))
    want = epoch(loaders[0])
    assert want[1].tolist() == [index % 2 for index in want[2].tolist()]
    assert epoch(loaders[2])[0][:, 0].float().mean() > 150
    no_decoding(monkeypatch)
    assert_same(epoch(loaders[1]), want)


def test_the_estimate_is_near(images, kept):
    epoch(disk_cached(loader_of(part_of(images)), kept))
    size = os.path.getsize(file_in(kept))
    assert estimated_bytes(part_of(images).source, SIDE) == pytest.approx(size, rel=0.02)
    whole = estimated_bytes(part_of(images).source, 0)
    assert whole == pytest.approx(15 * 3 * 90 * 70, rel=0.05)


def test_large_jpeg_files_are_decoded_at_a_part_of_their_size(tmp_path, kept):
    """In one way for all epochs, which ``scaled`` turns off."""
    root = image_folder(tmp_path / "set", {"train": 1, "val": 1}, size=(400, 300), suffix=".jpg")
    found = {}
    for scaled in (True, False):
        loader = disk_cached(loader_of(part_of(root)), replace(kept, scaled=scaled))
        found[scaled] = loader.dataset.source.open(0)
        assert np.array_equal(found[scaled], loader.dataset.source.open(0))
    whole = decode_tensor(str(root / "train" / "amber" / "0.jpg"))
    resize = functools.partial(torch.nn.functional.interpolate, mode="bicubic", antialias=True)
    exact = resize(whole[None], size=found[False].shape[:2])[0].permute(1, 2, 0).numpy()
    assert np.array_equal(found[False], exact)
    assert found[True].shape == exact.shape and not np.array_equal(found[True], exact)
    assert abs(found[True].astype(int) - exact).mean() < 3


def test_images_of_shards_are_kept_until_a_shard_changes(images, kept, tmp_path, monkeypatch):
    shards = tmp_path / "shards"
    assert pack(["--data-path", str(images), "--output-dir", str(shards)]) == 0
    folder = epoch(disk_cached(loader_of(part_of(images)), replace(kept, folder=str(tmp_path))))
    part = {"root": shards, "data_set": "wds/x"}
    loader = disk_cached(loader_of(part_of(**part)), kept)
    assert_same(epoch(loader), folder)
    (shard,) = shards.glob("train-*.tar")
    later = shard.stat().st_mtime_ns + 10**9
    with monkeypatch.context() as patched:
        no_decoding(patched)
        assert_same(epoch(disk_cached(loader_of(part_of(**part)), kept)), folder)
    os.utime(shard, ns=(later, later))
    disk_cached(loader_of(part_of(**part)), kept)
    assert len(os.listdir(kept.folder)) == 2


def test_a_set_that_was_moved_is_another_one(images, kept, tmp_path):
    epoch(disk_cached(loader_of(part_of(images)), kept))
    moved = shutil.copytree(images, tmp_path / "moved")
    epoch(disk_cached(loader_of(part_of(moved)), kept))
    assert len(os.listdir(kept.folder)) == 2
    assert isinstance(part_of(moved).source, FileSource)
