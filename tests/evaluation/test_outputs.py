"""Samples of any shape in files of every format, and what an interruption leaves."""

import io
import json
import os
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from evaluation.outputs import SampleFolder
from evaluation.pictures import image_grid, to_uint8
from solvers import NoiseSchedule
from tests.evaluation.helpers import in_processes
from tests.test_sample import images_in
from tests.tiny_models import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", NoiseSchedule.flow())


def run(model, folder, *args):
    options = ["--denoiser", model, "--solver", "euler:2", "--num_samples", 5, "--seed", 3, "--output", folder, *args]
    sample.main(["generate", *map(str, options)])


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    run(model, folder)
    return images_in(folder)


def test_adm_holds_bytes(model, plain, tmp_path):
    run(model, tmp_path, "--format", "adm")
    found = np.load(tmp_path / "samples.npz")["arr_0"]
    assert found.dtype == np.uint8
    assert np.array_equal(found, to_uint8(torch.from_numpy(plain)))


def test_png_and_webdataset_hold_the_same_pictures(model, plain, tmp_path):
    expected = to_uint8(torch.from_numpy(plain))
    run(model, tmp_path / "png", "--format", "png")
    files = sorted((tmp_path / "png" / "images").iterdir())
    assert [file.stem for file in files] == [f"{seed:010d}" for seed in range(3, 8)]
    assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), expected)
    run(model, tmp_path / "tar", "--format", "webdataset")
    with tarfile.open(tmp_path / "tar" / "samples-00000.tar") as archive:
        pictures = [np.asarray(Image.open(io.BytesIO(archive.extractfile(one).read()))) for one in archive]
    assert np.array_equal(np.stack(pictures), expected)


def test_blocks_that_are_made_are_not_made_again(model, plain, tmp_path, monkeypatch):
    monkeypatch.setattr("sample.BLOCK", 2)
    made = []
    keep = SampleFolder.keep

    def broken(self, block, samples):
        keep(self, block, samples)
        made.append(block.start)
        if len(made) == 2:
            raise ValueError("broken off")

    monkeypatch.setattr(SampleFolder, "keep", broken)
    labels = ["--labels", "4", "2", "7", "--batch_size", "2"]
    with pytest.raises(SystemExit):
        run(model, tmp_path / "a", *labels)
    assert not (tmp_path / "a" / "samples.npz").exists()
    run(model, tmp_path / "a", *labels)
    assert made == [0, 2, 4]
    monkeypatch.undo()
    run(model, tmp_path / "b", *labels)
    np.testing.assert_allclose(images_in(tmp_path / "a"), images_in(tmp_path / "b"), atol=1e-5)
    assert {file.name for file in (tmp_path / "a").iterdir()} == {"samples.npz", "grid.png", "manifest.json"}


def test_processes_share_the_blocks(model, plain, tmp_path, monkeypatch):
    """Also where one of them has made its share before the other looks."""
    monkeypatch.setattr("sample.BLOCK", 2)

    def share(rank: int) -> list[int]:
        os.environ["RANK"] = str(rank)
        missing, made, keep = SampleFolder.missing, [], SampleFolder.keep

        def late(self, *args):
            time.sleep(rank)
            return missing(self, *args)

        def kept(self, block, samples):
            made.append(block.start)
            keep(self, block, samples)

        SampleFolder.missing, SampleFolder.keep = late, kept
        run(model, tmp_path / "out", "--batch_size", "2")
        return made

    assert in_processes(share, 2, tmp_path / "ranks") == [[0, 4], [2]]
    np.testing.assert_allclose(images_in(tmp_path / "out"), plain, atol=1e-5)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"samples.npz", "grid.png", "manifest.json"}


class Vectors(torch.nn.Module):
    """Samples without height and width."""

    schedule, sample_shape = NoiseSchedule.flow(), (6,)

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, timestep, condition=None):
        return torch.tanh(self.scale * x)


def test_samples_that_are_no_pictures(tmp_path, capsys):
    name = f"{__name__}.Vectors"
    run(name, tmp_path / "npz")
    assert images_in(tmp_path / "npz").shape == (5, 6)
    assert (tmp_path / "npz" / "grid.png").is_file()
    with pytest.raises(SystemExit):
        run(name, tmp_path / "adm", "--format", "adm")
    assert "adm holds pictures, and this model makes (6,): use --format npz" in capsys.readouterr().err
    assert not (tmp_path / "adm").exists()


@pytest.mark.parametrize("shape", [(6,), (2, 100), (3, 5, 8, 6)])
def test_comparisons_of_vectors_sound_and_videos_have_a_report(shape, tmp_path, monkeypatch):
    monkeypatch.setattr(Vectors, "sample_shape", shape)
    options = [f"--denoiser={__name__}.Vectors", "--solvers=[euler:2]", "--num_samples=3", "--reference=euler:4"]
    folders = [f"--output={tmp_path / 'out'}", f"--cache={tmp_path / 'cache'}"]
    sample.main(["compare", *options, "--metrics=[rmse]", "--bootstrap=0", *folders])
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png") >= 2
    (row,) = [row for row in json.loads((tmp_path / "out" / "report.json").read_text()) if not row["is_reference"]]
    assert 0 < row["rmse"] < 1


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((6,), (8, 6)),
        ((2, 1000), (8, 256)),
        ((16, 4), (16, 4)),
        ((3, 5, 8, 6), (8, 24)),
        ((2, 8, 6), (8, 6)),
        ((16, 8, 6), (8, 6)),
    ],
)
def test_pictures_of_samples_of_any_shape(shape, size):
    """Vectors, sound, tokens, videos (four frames side by side), two channels, latents."""
    pictures = to_uint8(torch.linspace(-1, 1, 2 * int(np.prod(shape))).reshape(2, *shape))
    assert pictures.shape == (2, *size, 3)
    assert pictures.min() < 40 < 140 < pictures.max()
    assert image_grid(torch.zeros(2, *shape), 2).ndim == 3
