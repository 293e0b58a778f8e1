"""Images: shards, digits, order of the samples, resume and ranks."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.image_shards import describe_samples, read_shards
from data.images import ImageArray, ImageData
from data.loader import EpochBatchSampler, ResumableLoader, seed_of
from data.shards import add_member


def write_shard(path: Path, start: int, count: int, size: int = 4, labels: bool = True, mode: str = "RGB") -> None:
    """Grey PNGs whose brightness is their number, with the number modulo 10 as label."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for k in range(start, start + count):
            picture = io.BytesIO()
            Image.fromarray(np.full((size, size, 3), k, dtype=np.uint8)).convert(mode).save(picture, "PNG")
            files = {"png": picture.getvalue()} | ({"cls": str(k % 10).encode()} if labels else {})
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{k:05d}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    write_shard(tmp_path / "x-train-0001.tar", 6, 4)
    write_shard(tmp_path / "x-train-0000.tar.gz", 0, 6)
    write_shard(tmp_path / "x-test-0000.tar", 20, 3)
    return tmp_path


def numbered(count: int, flip: bool = False) -> ImageArray:
    images = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1) + np.zeros((1, 1, 2, 2), dtype=np.uint8)
    return ImageArray(images, np.arange(count), flip)


def labels_of(loader) -> list[list[int]]:
    return [labels.tolist() for _, labels in loader]


def test_shards_are_read_in_order(shards):
    images, labels = read_shards(shards, "*train*.tar*")
    assert images.shape == (10, 3, 4, 4)
    assert images.dtype == np.uint8
    assert images[:, 0, 0, 0].tolist() == list(range(10)) == labels.tolist()


def test_a_dot_in_the_name_of_a_folder_is_no_extension(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for label, folder in enumerate(("v1.0/cats", "v1.0/dogs", "v2.0/cats")):
            content = io.BytesIO()
            Image.new("RGB", (4, 4), (10 * label, 0, 0)).save(content, "png")
            add_member(archive, f"{folder}/0001.png", content.getvalue())
            add_member(archive, f"{folder}/0001.cls", str(label).encode())
    images, labels = read_shards(tmp_path, "*.tar")
    assert labels.tolist() == [0, 1, 2]
    assert images[:, 0, 0, 0].tolist() == [0, 10, 20]


def test_a_half_written_record_of_samples_is_named(tmp_path):
    (tmp_path / "samples.json").write_text('{"solver": "dd')
    with pytest.raises(ValueError, match=r"samples\.json is not valid JSON .*: sample the images again"):
        describe_samples(tmp_path)


def test_grey_pictures_keep_one_channel_among_their_own_kind(tmp_path):
    write_shard(tmp_path / "a.tar", 5, 2, mode="L")
    images, _ = read_shards(tmp_path, "a.tar")
    assert images.shape == (2, 1, 4, 4)
    write_shard(tmp_path / "b.tar", 7, 2)
    images, _ = read_shards(tmp_path, "*.tar")
    assert images.shape == (4, 3, 4, 4)
    assert images[:, :, 0, 0].tolist() == [[k] * 3 for k in range(5, 9)]


def test_values_span_minus_one_to_one():
    images, _ = ImageArray(np.array([0, 51, 255], dtype=np.uint8).reshape(3, 1, 1, 1), np.zeros(3, int)).__getitems__(
        [0, 1, 2]
    )
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.flatten(), torch.tensor([-1.0, -0.6, 1.0]))


def test_an_epoch_shows_each_image_and_its_mirror_once():
    images = np.arange(6, dtype=np.uint8).reshape(3, 1, 1, 2)
    array = ImageArray(images, np.arange(3), flip=True)
    assert len(array) == 6
    shown, labels = array.__getitems__(list(range(6)))
    assert torch.equal(shown[3:], shown[:3].flip(-1))
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_data_module_on_shards(shards):
    data = ImageData(data_dir=str(shards), batch_size=5, flip=False)
    data.setup("fit")
    train = labels_of(data.train_dataloader())
    assert sorted(train[0] + train[1]) == list(range(10))
    assert train != [list(range(5)), list(range(5, 10))]
    assert labels_of(data.val_dataloader()) == [[0, 1, 2]]


def test_digits_are_split_without_overlap():
    data = ImageData("digits", batch_size=64, flip=False)
    data.setup("fit")
    assert len(data._train) + len(data._val) == 1797
    assert len(data._val) == 179
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (64, 1, 8, 8)
    assert images.min() == -1
    assert images.max() == 1
    assert set(labels.tolist()) <= set(range(10))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_an_epoch_without_repeats(world_size):
    loaders = [
        ResumableLoader(numbered(50), EpochBatchSampler(50, 7, 0, rank, world_size)) for rank in range(world_size)
    ]
    shares = [labels_of(loader) for loader in loaders]
    assert {len(share) for share in shares} == {50 // 7}
    alone = labels_of(ResumableLoader(numbered(50), EpochBatchSampler(50, 7)))
    for step, batch in enumerate(alone):
        assert sorted(label for share in shares for label in share[step]) == sorted(batch)
    seen = [label for share in shares for batch in share for label in batch]
    assert len(seen) == len(set(seen)) == 49


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_sees_every_sample_once(world_size):
    samplers = [EpochBatchSampler(11, 4, rank=rank, world_size=world_size, shuffle=False) for rank in range(world_size)]
    assert sorted(index for sampler in samplers for batch in sampler for index in batch) == list(range(11))
    assert all(len(list(sampler)) == len(sampler) for sampler in samplers)


def loader(seed: int = 0, num_workers: int = 0) -> ResumableLoader:
    return ResumableLoader(numbered(20), EpochBatchSampler(20, 4, seed), num_workers)


def test_epochs_and_seeds_have_their_own_order():
    one = loader()
    first, second = labels_of(one), labels_of(one)
    assert first != second
    assert first == labels_of(loader())
    assert first != labels_of(loader(seed=1))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("stop", [0, 3, 5, 7])
def test_resume_goes_on_at_the_next_batch(stop, num_workers):
    whole = loader()
    expected = labels_of(whole) + labels_of(whole)
    first, state, seen = loader(num_workers=num_workers), None, []
    for _ in range(2):
        for _, labels in first:
            if len(seen) == stop and state is None:
                break
            seen.append(labels.tolist())
            if len(seen) == stop:
                state = first.state_dict()
    resumed = loader(num_workers=num_workers)
    if state is not None:
        resumed.load_state_dict(state)
    rest = labels_of(resumed)
    assert rest == expected[stop : stop + len(rest)]
    assert len(rest) == (5 - stop % 5)


def test_seeds_depend_on_order_and_every_part():
    seeds = {seed_of("a", 1, 2), seed_of("a", 2, 1), seed_of("b", 1, 2), seed_of("a", 12)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no image shards .* in .*data_dir.*source cifar10"):
        ImageData(data_dir=str(tmp_path / "none")).setup("fit")


def test_shards_without_labels_are_named(tmp_path):
    write_shard(tmp_path / "train.tar", 0, 2, labels=False)
    with pytest.raises(ValueError, match=r"train\.tar: 2 images and 0 \.cls labels"):
        read_shards(tmp_path, "*.tar")


def test_images_of_two_sizes_are_refused(tmp_path):
    write_shard(tmp_path / "a.tar", 0, 2, size=4)
    write_shard(tmp_path / "b.tar", 2, 2, size=5)
    with pytest.raises(ValueError, match="differ in size"):
        read_shards(tmp_path, "*.tar")


def test_unknown_source_and_too_few_samples():
    with pytest.raises(ValueError, match="unknown image source 'nope'"):
        ImageData("nope")
    with pytest.raises(ValueError, match="3 samples, 4 of them in a step of 1 processes"):
        EpochBatchSampler(3, 4)
    with pytest.raises(ValueError, match="9 samples, 1 of them in a step of 2 processes"):
        EpochBatchSampler(9, 1, world_size=2)
