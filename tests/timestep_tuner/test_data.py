"""What a tuner learns from: shards of images and arrays, and noises that are fresh in every epoch."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from data.teacher_data import TeacherData
from data.trajectories import FIRST_SEED
from solvers import load_solver
from tests.solver_search.toys import SHAPE, Labelled
from tests.timestep_tuner.runs import SCHEDULE, fit, learn, make, opened


def shards(folder, kind="png", count=12, scale=1.0, label=1, shape=SHAPE):
    folder.mkdir(exist_ok=True)
    values = np.random.default_rng(0).choice([-1.0, 1.0], (count, *shape)).astype(np.float32) * scale
    with tarfile.open(folder / "a.tar", "w") as archive:
        for index, value in enumerate(values):
            content = io.BytesIO()
            if kind == "npy":
                np.save(content, value)
            else:
                Image.fromarray(((value[0] + 1) * 127.5).astype(np.uint8)).save(content, "png")
            for name, part in ((kind, content.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{index:04d}.{name}")
                member.size = len(part)
                archive.addfile(member, io.BytesIO(part))
    return TeacherData(images=str(folder), holdout=4, batch_size=4)


@pytest.mark.parametrize("kind", ["png", "npy"])
def test_images_and_arrays_of_shards(tmp_path, kind):
    tuner = make(Labelled(SCHEDULE), output=tmp_path, steps=4)
    source = shards(tmp_path / "shards", kind)
    fit(tuner, source)
    samples = [
        next(iter(loader))
        for loader in (source.train_dataloader(), source.choosing_batches(), source.reporting_batches())
    ]
    assert torch.cat([part.end for part in samples]).unique().tolist() == [-1, 1]
    assert torch.cat([part.condition for part in samples]).tolist() == [1] * 8
    info = load_solver(tmp_path / "tuned-ddim-4.json").info["fitted_on"]
    assert info["data"] == "shards shards"
    epochs = -(-4 // 2)  # four steps of two batches of four
    first = FIRST_SEED + 2**21
    assert info["seeds"] == [[first - 4, first + 8 * epochs]]


def test_noise_is_fresh_in_every_epoch_and_the_same_when_held_out(cache):
    tuning, seen = opened(cache, steps=8), []
    original = tuning._gauss_newton
    tuning._gauss_newton = lambda objective, batch, stage: seen.append(batch.seeds) or original(objective, batch, stage)
    learn(tuning)
    flat = [seed for seeds in seen for seed in seeds]
    assert len(set(flat)) == len(flat) == 64
    source = tuning.run.data
    held_out = [next(iter(part())) for part in (source.choosing_batches, source.reporting_batches) for _ in range(2)]
    first = FIRST_SEED + 2**21 - 8
    assert held_out[0].seeds == held_out[1].seeds == tuple(range(first, first + 4))
    assert held_out[2].seeds == held_out[3].seeds == tuple(range(first + 4, first + 8))
    assert torch.equal(held_out[0].noise, held_out[1].noise)
    assert not set(flat) & set(range(first, first + 8))
    assert source.held_out_seeds() == {"seeds": [[first + 4, first + 8]], "chosen_on": [[first, first + 4]]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "npy", "scale": 100.0}, r"values from -100 to 100: images lie in \[-1, 1\]"),
        ({"kind": "npy", "scale": float("nan")}, "values from nan"),
        ({"kind": "npy", "shape": (1, 3, 3)}, r"shape \(1, 3, 3\), the denoiser takes \(1, 2, 2\)"),
        ({"label": 7}, "label 7 is out of range: this denoiser has classes 0 to 2"),
        ({"count": 4}, "do not fit; make more"),
    ],
)
def test_shards_that_do_not_fit_are_refused_before_training(tmp_path, options, message):
    denoiser = Labelled(SCHEDULE)
    with pytest.raises(ValueError, match=message):
        fit(make(denoiser), shards(tmp_path / "shards", **options))
