"""The data of all methods: read in blocks, the same order everywhere, and what is refused."""

import pytest
import torch

from data.sources import StoredTrajectories
from data.teacher_data import TeacherData, Wanted
from data.trajectories import TrajectoryCache, generate_trajectories, run_teacher
from denoisers import with_guidance
from solvers import NoiseSchedule, named_solver
from tests.solver_search.toys import Labelled, TwoPoints

SCHEDULE = NoiseSchedule.linear()
SEEDS = range(2**31, 2**31 + 10)
TEACHER = named_solver("ddim:6", SCHEDULE)


def make_cache(folder, denoiser=None, table=TEACHER):
    generate_trajectories(
        denoiser or TwoPoints(SCHEDULE), table, SEEDS, folder, shard_size=4, dtype=torch.float64, progress=False
    )
    return str(folder)


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache")


def opened(source, states, denoiser=None, wanted=None, **options):
    data = TeacherData(source, **{"holdout": 3} | options)
    return data.open(denoiser or TwoPoints(SCHEDULE), wanted or Wanted(states))


def test_whole_trajectories_are_read_where_they_are_used(cache, monkeypatch):
    seen, read = [], TrajectoryCache.take
    monkeypatch.setattr(TrajectoryCache, "take", lambda self, numbers: seen.append(len(numbers)) or read(self, numbers))
    data = opened(cache, "path")
    (batch,) = data.train_dataloader()
    assert isinstance(batch, StoredTrajectories)
    assert len(batch) == 7
    assert not seen
    part = batch[2:4]
    assert seen == [2]
    everything = run_teacher(TwoPoints(SCHEDULE), TEACHER, SEEDS, torch.float64)
    expected = everything.choose([SEEDS.index(seed) for seed in part.seeds])
    assert torch.equal(part.states, expected.states)
    assert torch.equal(part.outputs, expected.outputs)


def test_any_order_comes_back_in_that_order(cache):
    numbers = [9, 0, 5, 5, 8, 1]
    found = TrajectoryCache(cache).take(numbers)
    assert found.seeds == tuple(SEEDS[number] for number in numbers)
    everything = TrajectoryCache(cache).load()
    assert torch.equal(found.states, everything.states[numbers])


def test_ends_are_the_ends_of_the_path_in_the_same_order(cache):
    (whole,), (ends,) = (opened(cache, states).train_dataloader() for states in ("path", "ends"))
    assert ends.seeds == whole[:].seeds
    assert torch.equal(ends.states, whole[:].states[:, [0, -1]])
    assert torch.equal(ends.noise, whole[:].noise)
    assert torch.equal(ends.at(TEACHER.alpha[-1], TEACHER.sigma[-1]), whole[:].end)


def test_samples_have_noises_of_their_own(cache):
    data = opened(cache, "samples", batch_size=7)
    loader = data.train_dataloader()
    first, second = next(iter(loader)), next(iter(loader))
    ends = TrajectoryCache(cache).load().end
    for batch in (first, second):
        order = [batch.seeds[k] - min(batch.seeds) for k in range(7)]
        assert torch.equal(batch.end, ends[order])
    assert not set(first.seeds) & set(second.seeds)
    assert not torch.equal(first.noise.sort(0).values, second.noise.sort(0).values)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_in_order_are_equally_many_on_all_processes(cache, world_size, monkeypatch):
    data = opened(cache, "path", wanted=Wanted("path", batch_size=2, in_order=True))
    seeds, counts = [], []
    for rank in range(world_size):
        monkeypatch.setattr(data, "processes", lambda rank=rank: (rank, world_size))
        batches = list(data.train_dataloader())
        counts.append(len(batches))
        seeds += [seed for batch in batches if len(batch) for seed in batch[:].seeds]
    assert len(set(counts)) == 1
    assert sorted(seeds) == list(SEEDS[:7])


def test_several_caches_carry_their_guidance(tmp_path):
    scales = (1.0, 2.0)
    folders = [make_cache(tmp_path / f"g{scale}", with_guidance(Labelled(SCHEDULE), scale)) for scale in scales]
    (batch,) = opened(folders, "path", with_guidance(Labelled(SCHEDULE), [1.0, 2.0])).train_dataloader()
    found = batch[:]
    assert sorted(found.condition["guidance_scale"].tolist()) == [1.0] * 7 + [2.0] * 7
    for scale in scales:
        rows = [k for k, value in enumerate(found.condition["guidance_scale"].tolist()) if value == scale]
        expected = run_teacher(
            with_guidance(Labelled(SCHEDULE), scale), TEACHER, [found.seeds[k] for k in rows], torch.float64
        )
        assert torch.equal(found.states[rows], expected.states)
    other = make_cache(tmp_path / "other", Labelled(SCHEDULE), named_solver("ddim:5", SCHEDULE))
    with pytest.raises(ValueError, match="of different solvers"):
        opened([folders[0], other], "path", Labelled(SCHEDULE))


def test_what_is_held_out_has_two_halves_in_every_cache(tmp_path):
    """Solvers for a range of guidance scales are chosen, and measured, on all of them."""
    scales = (1.0, 2.0)
    folders = [make_cache(tmp_path / f"g{scale}", with_guidance(Labelled(SCHEDULE), scale)) for scale in scales]
    data = opened(folders, "path", with_guidance(Labelled(SCHEDULE), [1.0, 2.0]), holdout=3)
    for part, seeds in ((data.choosing(), SEEDS[7:8]), (data.reporting(), SEEDS[8:10])):
        assert part[:].seeds == (*seeds, *seeds)
        assert sorted(part[:].condition["guidance_scale"].tolist()) == [1.0] * len(seeds) + [2.0] * len(seeds)
    expected = {"seeds": [[SEEDS[8], SEEDS[9] + 1]], "chosen_on": [[SEEDS[7], SEEDS[8]]]}
    assert data.held_out_seeds() == expected
    for loader, part in ((data.choosing_batches(), data.choosing()), (data.reporting_batches(), data.reporting())):
        (batch,) = loader
        assert (batch[:].seeds, loader.num_samples) == (part[:].seeds, len(part))


def test_seeds_are_told_apart(cache):
    assert opened(cache, "path").seed_ranges() == [[SEEDS[0], SEEDS[-1] + 1]]
    drawn = opened(cache, "samples", first_seed=100).seed_ranges()
    assert drawn == [[SEEDS[0], SEEDS[-1] + 1], [97, 107]]
    fresh = opened(None, "ends", limit=5, teacher="ddim:6", first_seed=100)
    (batch,) = fresh.train_dataloader()
    assert sorted(batch) == list(range(100, 105))
    assert fresh.seed_ranges() == [[97, 105]]


def test_refusals(cache, tmp_path):
    with pytest.raises(ValueError, match="give one source"):
        TeacherData(cache, images="folder")
    with pytest.raises(ValueError, match="say how many fresh trajectories"):
        TeacherData()
    for options in ({"holdout": -1}, {"batch_size": 0}, {"limit": 0}):
        with pytest.raises(ValueError, match="at least"):
            TeacherData(cache, **options)
    with pytest.raises(ValueError, match="10 samples: 8 to learn from and 3 to hold out do not fit"):
        opened(cache, "path", limit=8)
    with pytest.raises(ValueError, match="made afresh"):
        opened(None, "path", limit=8, wanted=Wanted("path", in_order=True))
