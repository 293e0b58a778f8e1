"""Data sets by name: Fashion-MNIST and MNIST from arrays or from torchvision's download, framed to 32x32."""

import numpy as np
import pytest
import torchvision.datasets

from data.images import ImageData


def pictures(count: int) -> np.ndarray:
    """White from a first column that is 0, so that a mirrored picture is another one."""
    images = np.full((count, 28, 28), 255, dtype=np.uint8)
    images[:, :, 0] = 0
    return images


def write(folder, name: str, train: int = 6, test: int = 3, **changed) -> None:
    for part, count in (("train", train), ("test", test)):
        labels = np.arange(count, dtype=np.uint8)
        np.savez(folder / f"{name}-{part}.npz", **{"images": pictures(count), "labels": labels} | changed)


def prepared(source: str, folder, **options) -> ImageData:
    data = ImageData(source, data_dir=str(folder), batch_size=3, **options)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("source", ["fashion", "mnist"])
def test_arrays_get_a_black_frame(tmp_path, source):
    write(tmp_path, source)
    images, labels = next(iter(prepared(source, tmp_path).val_dataloader()))
    assert images.shape == (3, 1, 32, 32)
    assert labels.tolist() == [0, 1, 2]
    assert (images[:, :, 2:30, 3:30] == 1).all()
    images[:, :, 2:30, 3:30] = -1
    assert (images == -1).all()


@pytest.mark.parametrize(("source", "shown"), [("fashion", 12), ("mnist", 6)])
def test_clothes_are_mirrored_and_figures_are_not(tmp_path, source, shown):
    write(tmp_path, source)
    assert len(prepared(source, tmp_path)._train) == shown
    assert len(prepared(source, tmp_path)._val) == 3
    assert len(prepared(source, tmp_path, flip=source == "mnist")._train) == 18 - shown


@pytest.mark.parametrize(("source", "name"), [("fashion", "FashionMNIST"), ("mnist", "MNIST")])
def test_without_arrays_torchvision_downloads(tmp_path, monkeypatch, source, name):
    downloads = []

    class Known:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            downloads.extend([train] * download)
            self.data, self.targets = pictures(4 if train else 2), [7] * (4 if train else 2)

    monkeypatch.setattr(torchvision.datasets, name, Known)
    data = prepared(source, tmp_path, flip=False)
    assert downloads == [True, False]
    assert (len(data._train), len(data._val)) == (4, 2)
    assert next(iter(data.val_dataloader()))[1].tolist() == [7, 7]


def test_the_folder_is_named_like_the_data(monkeypatch):
    monkeypatch.delenv("DATA_DIR", raising=False)
    folders = {source: str(ImageData(source).data_dir) for source in ("shards", "cifar10", "fashion", "mnist")}
    assert folders == {
        "shards": "data/cifar10",
        "cifar10": "data/cifar10",
        "fashion": "data/fashion",
        "mnist": "data/mnist",
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": np.zeros((6, 32, 32), np.uint8)}, r"fashion-train\.npz holds images \(6, 32, 32\) of uint8"),
        ({"images": np.zeros((6, 28, 28))}, r"holds images \(6, 28, 28\) of float64"),
        ({"labels": np.zeros(5, np.uint8)}, r"and 5 labels: give uint8 images"),
    ],
)
def test_other_arrays_are_refused(tmp_path, changed, message):
    write(tmp_path, "fashion", **changed)
    with pytest.raises(ValueError, match=message):
        prepared("fashion", tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    write(tmp_path, "fashion")
    np.savez(tmp_path / "fashion-train.npz", pictures=pictures(2))
    with pytest.raises(ValueError, match=r"fashion-train\.npz cannot be read .*needs the arrays images and labels"):
        prepared("fashion", tmp_path)


def test_data_that_are_not_there_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"torchvision has no FashionMNIST in .*: download it once .*DATA_DIR"):
        ImageData("fashion", data_dir=str(tmp_path)).setup("fit")
