"""Pictures on disk, and moments of features in the formats of other programs."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.distances import Gaussian
from evaluation.extractors import Extractor
from evaluation.foreign import is_foreign, read_moments, write_moments
from evaluation.sources import find_pictures
from evaluation.statistics import find_statistics, main
from tests.evaluation.helpers import Pooled, extractor

IMAGES = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
GAUSSIAN = Gaussian.of(extractor()(IMAGES.float() / 127.5 - 1)[0])


def png(image) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy().squeeze()).save(content, "png")
    return content.getvalue()


def as_files(folder, images=IMAGES):
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        (folder / f"{index:03d}.png").write_bytes(png(image))


def as_shards(folder, name="samples"):
    folder.mkdir(parents=True)
    for number, images in enumerate(IMAGES.split(20)):
        with tarfile.open(folder / f"{name}-{number}.tar", "w") as archive:
            for index, image in enumerate(images):
                for extension, content in (("png", png(image)), ("cls", b"1")):
                    member = tarfile.TarInfo(f"{index:03d}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def as_npz(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def everywhere(folder):
    as_files(folder / "files")
    as_files(folder / "generated" / "images")
    (folder / "generated" / "grid.png").write_bytes(png(torch.zeros(3, 90, 90, dtype=torch.uint8)))
    as_shards(folder / "shards")
    as_shards(folder / "train", "some-train")
    with tarfile.open(folder / "train" / "some-test-0.tar", "w"):
        pass
    as_npz(folder / "adm.npz", arr_0=IMAGES.permute(0, 2, 3, 1).numpy())
    np.savez(folder / "stored.npz", labels=np.zeros(3), arr_0=IMAGES.permute(0, 2, 3, 1).numpy())
    as_npz(folder / "samples" / "samples.npz", samples=IMAGES.float().numpy() / 127.5 - 1)
    return ["files", "generated", "shards", "train", "adm.npz", "stored.npz", "samples"]


def test_every_kind_holds_the_same_pictures(tmp_path):
    for name in everywhere(tmp_path):
        pictures = find_pictures(tmp_path / name)
        assert (pictures.count, pictures.shape) == (50, (3, 8, 8)), name
        assert torch.equal(torch.cat(list(pictures)), IMAGES), name
        chosen = [pictures.read(block) for block in (range(30, 33), range(40, 50), range(7, 9))]
        assert all(
            torch.equal(found, IMAGES[k]) for found, k in zip(chosen, (slice(30, 33), slice(40, 50), slice(7, 9)))
        )


def test_grey_files_join_coloured_ones(tmp_path):
    as_files(tmp_path / "grey", IMAGES[:4, :1])
    assert find_pictures(tmp_path / "grey").shape == (1, 8, 8)
    (tmp_path / "grey" / "x.png").write_bytes(png(IMAGES[5]))
    pictures = find_pictures(tmp_path / "grey").read(range(5))
    assert torch.equal(pictures[:4], IMAGES[:4, :1].expand(-1, 3, -1, -1))
    assert torch.equal(pictures[4], IMAGES[5])


def test_what_is_no_pictures(tmp_path):
    as_files(tmp_path / "sizes", IMAGES[:2])
    (tmp_path / "sizes" / "x.png").write_bytes(png(torch.zeros(3, 4, 4, dtype=torch.uint8)))
    with pytest.raises(ValueError, match=r"pictures of sizes differ in size \(\(4, 4\), \(8, 8\)\): crop them"):
        find_pictures(tmp_path / "sizes").read(range(3))
    pictures = find_pictures(tmp_path / "sizes")
    pictures.read(range(2))
    with pytest.raises(ValueError, match="pictures of sizes differ in size"):
        pictures.read(range(2, 3))
    (tmp_path / "sizes" / "y.png").touch()
    with pytest.raises(ValueError, match=r"sizes/y\.png: an empty file"):
        find_pictures(tmp_path / "sizes").read(range(3, 4))
    as_npz(tmp_path / "latents.npz", samples=np.zeros((2, 4, 8, 8), np.float32))
    with pytest.raises(ValueError, match=r"samples of .* is float32 \(2, 4, 8, 8\): pictures have 1 or 3 channels"):
        find_pictures(tmp_path / "latents.npz")
    as_npz(tmp_path / "moments.npz", mu=np.zeros(2))
    with pytest.raises(ValueError, match="holds mu and no pictures: they are called arr_0 or samples"):
        find_pictures(tmp_path / "moments.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no pictures: give a folder"):
        find_pictures(tmp_path / "empty")
    (tmp_path / "broken.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"broken\.npz cannot be read"):
        find_pictures(tmp_path / "broken.npz")


def test_moments_of_every_program(tmp_path):
    mean, covariance = GAUSSIAN.mean.numpy(), GAUSSIAN.covariance.numpy()
    np.savez(tmp_path / "edm.npz", mu=mean, sigma=covariance)
    torch.save({"mu": mean, "sigma": covariance}, tmp_path / "fidelity.pt")
    torch.save({"mu": GAUSSIAN.mean.float(), "sigma": GAUSSIAN.covariance}, tmp_path / "tensors.pt")
    for name in ("edm.npz", "fidelity.pt", "tensors.pt"):
        found = find_statistics(str(tmp_path / name), extractor(), cache=tmp_path / "cache")
        assert torch.allclose(found.gaussian.mean, GAUSSIAN.mean, atol=1e-7), name
        assert torch.allclose(found.gaussian.covariance, GAUSSIAN.covariance), name
        assert (found.gaussian.count, len(found.features), found.extractor) == (None, 0, extractor().fingerprint)
    assert not (tmp_path / "cache").exists()


def test_a_file_of_adm_holds_moments_and_pictures(tmp_path):
    """Moments are Inception's; other extractors, and what is taken of pairs, need the pictures."""
    pictures = IMAGES.permute(0, 2, 3, 1).numpy()
    spatial = {"mu_s": np.ones(12), "sigma_s": np.eye(12)}
    path = tmp_path / "adm.npz"
    np.savez(path, arr_0=pictures, mu=np.zeros(12), sigma=2 * np.eye(12), **spatial)
    pooled, places, other = (find_statistics(str(path), named(n), cache=tmp_path) for n in ("inception", SPATIAL, "x"))
    assert (float(pooled.gaussian.mean.sum()), float(places.gaussian.mean.sum())) == (0, 12)
    assert (float(pooled.gaussian.covariance.trace()), float(places.gaussian.covariance.trace())) == (24, 12)
    assert torch.allclose(other.gaussian.covariance, GAUSSIAN.covariance, atol=1e-6)
    assert len(pooled.features) == len(other.features) == 50
    assert (pooled.gaussian.count, other.gaussian.count) == (None, 50)


SPATIAL = "inception-spatial"


def named(name: str) -> Extractor:
    return Extractor(Pooled(), {"name": name}, 12, 2, (3, 8, 8))


def test_moments_are_written_as_they_are_read(tmp_path, capsys):
    path = tmp_path / "ours.npz"
    write_moments(path, GAUSSIAN, "inception")
    write_moments(path, Gaussian(GAUSSIAN.mean + 1, GAUSSIAN.covariance, 9), SPATIAL)
    assert set(np.load(path).files) == {"mu", "sigma", "mu_s", "sigma_s"}
    assert torch.equal(read_moments(path, "inception", 12).mean, GAUSSIAN.mean)
    assert torch.equal(read_moments(path, SPATIAL, 12).mean, GAUSSIAN.mean + 1)
    as_files(tmp_path / "files")
    classifier = "checkpoints/cifar10-classifier"
    with pytest.raises(SystemExit):
        main([str(tmp_path / "files"), "--extractor", classifier, "--output", str(tmp_path / "x.npz")])
    assert "takes images (3, 32, 32), not (3, 8, 8)" in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_nothing_is_unpickled(tmp_path, capsys):
    content = pickle.dumps({"mu": Evil()})
    for name, message in (("edm.pkl", "is a pickle, which may run code: store its mean as mu"), ("x.pt", "cannot be")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            find_statistics(str(tmp_path / name), extractor())
    np.savez(tmp_path / "objects.npz", mu=np.array([Evil()], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="cannot be read as mu and sigma"):
        find_statistics(str(tmp_path / "objects.npz"), extractor())
    np.savez(tmp_path / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"holds moments \(3,\) and \(3, 3\), but pooled has 12 features"):
        find_statistics(str(tmp_path / "small.npz"), extractor())
    assert "code ran" not in capsys.readouterr().out
    assert not is_foreign(tmp_path / "none.npz", "inception")
