"""The trajectory cache: exact contents, resume after a kill, damage, mixing, and any number of processes."""

import json
import os
import signal

import lightning
import pytest
import torch
import webdataset
from safetensors.torch import load

from data.manifest import describe_teacher
from data.shards import read_shard
from data.teacher import TeacherTrajectories, TrajectoryShards
from data.trajectories import FIRST_SEED, TrajectoryCache, generate_trajectories, run_teacher
from data.trajectory_writer import TrajectoryWriter, name_broken
from solvers import NoiseSchedule, sample, start_noise
from solvers.named import named_solver
from solvers.nodes import Nodes
from tests.analytic import two_point_denoiser

SCHEDULE = NoiseSchedule.linear()
SEEDS = range(FIRST_SEED, FIRST_SEED + 10)


class Toy(torch.nn.Module):
    """Two-point data, shifted by the class; counts its calls and can stop the process at one of them."""

    def __init__(self, scale: float = 1.0, kill_at: int | None = None) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.exact = two_point_denoiser(SCHEDULE)
        self.schedule, self.sample_shape, self.num_classes, self.name = SCHEDULE, (1, 4, 4), 3, "toy"
        self.calls, self.kill_at = 0, kill_at

    def forward(self, x, timestep, condition=None):
        self.calls += 1
        if self.calls == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        shift = 0.1 * condition.to(x).reshape(-1, 1, 1, 1)
        return (self.scale * self.exact(x.double() + shift, timestep)).to(x.dtype)


TEACHER = named_solver("ddim:5", SCHEDULE)


def generate(folder, denoiser=None, seeds=SEEDS, table=TEACHER, **options):
    options = {"shard_size": 4, "progress": False} | options
    generate_trajectories(denoiser or Toy(), table, seeds, folder, **options)


def test_holds_the_trajectories_of_the_sampler(tmp_path):
    generate(tmp_path, dtype=torch.float64)
    cache, denoiser = TrajectoryCache(tmp_path), Toy()
    cache.check(denoiser)
    everything = cache.load()
    assert everything.seeds == tuple(SEEDS)
    assert len(cache) == 10
    assert torch.equal(everything.condition, torch.tensor(SEEDS) % 3)
    noise = start_noise(SEEDS, (1, 4, 4), torch.float64)
    assert torch.equal(everything.states[:, 0], noise)
    image = sample(denoiser, TEACHER, noise, everything.condition)
    torch.testing.assert_close(everything.states[:, -1], image, rtol=0, atol=1e-12)
    row = TEACHER.state_coef[2, 2] * everything.states[:, 2] + TEACHER.output_coef[2, 2] * everything.outputs[:, 2]
    torch.testing.assert_close(everything.states[:, 3], row, rtol=0, atol=1e-12)
    assert torch.equal(cache.table.output_coef, TEACHER.output_coef)
    assert cache.schedule == SCHEDULE


def test_shards_are_webdataset_shards(tmp_path):
    generate(tmp_path)
    samples = list(webdataset.WebDataset(str(tmp_path / "shard-00002.tar"), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [f"{seed:010d}" for seed in SEEDS[8:]]
    tensors = load(samples[1]["safetensors"])
    assert int(tensors["seed"]) == SEEDS[9]
    assert torch.equal(tensors["timesteps"], TEACHER.timesteps)
    assert tensors["states"].shape == (6, 1, 4, 4)
    assert torch.equal(tensors["outputs"], TrajectoryCache(tmp_path).load().outputs[9])


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_batches_cover_everything_in_order(tmp_path, batch_size):
    generate(tmp_path)
    cache = TrajectoryCache(tmp_path)
    batches = list(cache.batches(batch_size))
    assert [seed for batch in batches for seed in batch.seeds] == list(SEEDS)
    assert max(len(batch) for batch in batches) == min(batch_size, 10)
    assert torch.equal(torch.cat([batch.states for batch in batches]), cache.load().states)
    assert [len(batch) for batch in cache.batches(3, limit=5)] == [3, 2]


def test_nested_conditions_come_back(tmp_path):
    nested = {"text": torch.rand(10, 2), "more": (torch.arange(10), {"a": torch.rand(10, 1), "ab": torch.rand(10, 3)})}

    class Free(Toy):
        def forward(self, x, timestep, condition=None):
            return x + condition["text"].sum(1).reshape(-1, 1, 1, 1)

    def condition(seeds):
        index = torch.tensor(seeds) - FIRST_SEED
        text, (number, inner) = nested["text"][index], nested["more"]
        return {"text": text, "more": (number[index], {key: value[index] for key, value in inner.items()})}

    generate(tmp_path, Free(), condition=condition)
    found = TrajectoryCache(tmp_path).load().condition
    assert torch.equal(found["text"], nested["text"])
    assert torch.equal(found["more"][0], nested["more"][0])
    assert {key: value.tolist() for key, value in found["more"][1].items()} == {
        key: value.tolist() for key, value in nested["more"][1].items()
    }


def test_goes_on_after_a_kill_without_recomputing(tmp_path):
    """Killed in the third shard: the first two stay as they are, byte for byte and untouched."""
    child = os.fork()
    if child == 0:
        generate(tmp_path, Toy(kill_at=13))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with pytest.raises(ValueError, match="incomplete"):
        TrajectoryCache(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*.tar")}
    assert 1 <= len(before) <= 2
    denoiser = Toy()
    generate(tmp_path, denoiser)
    assert denoiser.calls == 5 * (3 - len(before))
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    assert not list(tmp_path.glob(".*"))
    uninterrupted = run_teacher(Toy(), TEACHER, SEEDS)
    assert torch.equal(TrajectoryCache(tmp_path).load().states, uninterrupted.states)


def test_nothing_is_computed_twice(tmp_path):
    generate(tmp_path)
    denoiser = Toy()
    generate(tmp_path, denoiser)
    assert denoiser.calls == 0


def test_leftovers_of_a_kill_are_removed(tmp_path):
    generate(tmp_path)
    (tmp_path / ".shard-00001.tar.abc.tar").write_bytes(b"half")
    generate(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_second_run_leaves_alone_what_the_first_one_is_writing(tmp_path):
    """Its other processes do not wait for the first of them, which is refused."""
    generate(tmp_path)
    (tmp_path / "shard-00001.tar").unlink()
    partial = tmp_path / ".shard-00001.tar.elsewhere.1.abc.tar"
    partial.write_bytes(b"half")
    writer = TrajectoryWriter(tmp_path, describe_teacher(Toy(), TEACHER, torch.float32), SEEDS, 4)
    assert writer.prepare(1, 2) == [1]
    assert partial.exists()


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_names_a_damaged_shard(tmp_path, damage):
    generate(tmp_path)
    shard = tmp_path / "shard-00001.tar"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    {"truncate": lambda: shard.write_bytes(content[:3000]), "flip": lambda: shard.write_bytes(content)}.get(
        damage, shard.unlink
    )()
    expected = {"truncate": "has 3000 bytes", "flip": "corrupt", "remove": "missing"}[damage]
    with pytest.raises(ValueError, match=f"shard-00001.tar.*{expected}"):
        TrajectoryCache(tmp_path).load()
    assert len(next(TrajectoryCache(tmp_path).batches(4))) == 4
    if damage != "remove":
        with pytest.raises(ValueError, match=r"shard-00001\.tar"):
            generate(tmp_path)
        shard.unlink()
        shard.with_suffix(".json").unlink()
    denoiser = Toy()
    generate(tmp_path, denoiser)
    assert denoiser.calls == 5
    assert torch.equal(TrajectoryCache(tmp_path).load().states, run_teacher(Toy(), TEACHER, SEEDS).states)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"denoiser": Toy(0.9)}, "weight_hash"),
        ({"table": named_solver("ddim@linspace:5", SCHEDULE)}, "table"),
        ({"dtype": torch.float16}, "dtype"),
        ({"seeds": range(20)}, "seeds"),
        ({"shard_size": 5}, "shard_size"),
    ],
)
def test_refuses_to_mix(tmp_path, change, name):
    generate(tmp_path)
    with pytest.raises(ValueError, match=f"holds trajectories with another {name}"):
        generate(tmp_path, **change)


def test_check_refuses_another_denoiser(tmp_path):
    generate(tmp_path)
    cache = TrajectoryCache(tmp_path)
    with pytest.raises(ValueError, match="made for weights"):
        cache.check(Toy(0.9))
    guided = Toy()
    guided.guidance_scale = 2.0
    with pytest.raises(ValueError, match=r"made for guidance scale 1\.0, found 2\.0"):
        cache.check(guided)
    other = Toy()
    other.schedule = NoiseSchedule.scaled_linear()
    with pytest.raises(ValueError, match="made for noise schedule"):
        cache.check(other)


def test_clear_errors(tmp_path):
    with pytest.raises(ValueError, match="holds no trajectories"):
        TrajectoryCache(tmp_path)
    with pytest.raises(ValueError, match="none twice"):
        generate(tmp_path, seeds=[3, 3])
    with pytest.raises(ValueError, match="shard_size is 0"):
        generate(tmp_path, shard_size=0)
    huge = Toy()
    huge.sample_shape = (10**6, 10**3, 10**3)
    with pytest.raises(ValueError, match=r"need .* GB and .* GB free"):
        TrajectoryWriter(tmp_path, describe_teacher(huge, TEACHER, torch.float32), SEEDS, 4).prepare()
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        TrajectoryCache(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 7}))
    with pytest.raises(ValueError, match="format_version 7"):
        TrajectoryCache(tmp_path)


def edit_manifest(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize("name", ["../shard-00000.tar", "/tmp/shard-00000.tar", "a/shard-00000.tar", "..", "C:\\x.tar"])
def test_a_manifest_names_no_shard_outside_its_folder(tmp_path, name):
    generate(tmp_path / "in")
    (tmp_path / "shard-00000.tar").write_bytes((tmp_path / "in/shard-00000.tar").read_bytes())
    records = list(json.loads((tmp_path / "in/manifest.json").read_text())["shards"].values())
    edit_manifest(tmp_path / "in", shards=dict(zip((name, "shard-00001.tar", "shard-00002.tar"), records)))
    with pytest.raises(ValueError, match="shards lie beside their manifest"):
        TrajectoryCache(tmp_path / "in")


def test_shards_that_a_manifest_swaps_are_refused(tmp_path):
    generate(tmp_path)
    shards = json.loads((tmp_path / "manifest.json").read_text())["shards"]
    first, second, third = shards
    edit_manifest(tmp_path, shards={name: shards[name] for name in (second, first, third)})
    assert TrajectoryCache(tmp_path).take([9]).seeds == (SEEDS[9],)
    with pytest.raises(ValueError, match=rf"{second} holds seeds .* where the manifest says"):
        TrajectoryCache(tmp_path).load()


@pytest.mark.parametrize(("text", "message"), [('{"sha256": "', "is not valid JSON"), ("[]", "holds a list")])
def test_a_half_written_record_is_named(tmp_path, text, message):
    generate(tmp_path)
    (tmp_path / "shard-00001.json").write_text(text)
    with pytest.raises(ValueError, match=rf"shard-00001\.json {message}.*delete it and shard-00001\.tar"):
        generate(tmp_path)


def test_an_incomplete_manifest_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format_version": 1, "teacher": {}}')
    with pytest.raises(ValueError, match=r"manifest\.json lacks seeds, shard_size, complete, shards: delete"):
        TrajectoryCache(tmp_path)


@pytest.mark.parametrize(("dtype", "found"), [(torch.float16, torch.float32), (torch.float64, torch.float64)])
def test_what_is_stored_in_half_precision_is_computed_with_in_float32(tmp_path, dtype, found):
    generate(tmp_path, dtype=dtype)
    read = TrajectoryCache(tmp_path).load()
    assert (read.states.dtype, read.outputs.dtype) == (found, found)
    exact = run_teacher(Toy(), TEACHER, list(SEEDS), torch.float64)
    torch.testing.assert_close(read.states.double(), exact.states, rtol=2e-3, atol=2e-3)


def test_says_the_size_first(tmp_path, capsys):
    generate(tmp_path)
    assert "10 of 5 steps, 10 to make: 0.0 MB (float32)" in capsys.readouterr().err
    size = 10 * 11 * 16 * 4
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    writer = TrajectoryWriter(tmp_path, describe_teacher(Toy(), TEACHER, torch.float32), SEEDS, 4)
    assert writer._bytes_per_trajectory() * 10 == size < stored


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_processes_share_the_shards(tmp_path, world_size):
    """More processes than shards (3) is fine; together they make each shard once."""
    calls = []
    for rank in range(world_size):
        denoiser = Toy()
        generate(tmp_path, denoiser, rank=rank, world_size=world_size)
        calls.append(denoiser.calls // 5)
    assert calls == [len(range(rank, 3, world_size)) for rank in range(world_size)]
    assert torch.equal(TrajectoryCache(tmp_path).load().states, run_teacher(Toy(), TEACHER, SEEDS).states)


def predict(denoiser, folder, devices=1):
    """`train.py predict` of seven trajectories."""
    module = TeacherTrajectories(
        denoiser, str(folder), teacher="ddim:5", num_trajectories=7, shard_size=4, dtype="float64"
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="auto" if devices == 1 else "ddp_fork",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.predict(module, datamodule=TrajectoryShards(), return_predictions=False)


class Breaks(Toy):
    """Far off for one class."""

    def forward(self, x, timestep, condition=None):
        return super().forward(x, timestep, condition) * (1 + 9 * (condition == 0)).to(x).reshape(-1, 1, 1, 1)


def test_seeds_at_which_the_teacher_breaks_are_named(tmp_path, recwarn):
    predict(Breaks(), tmp_path)
    (found,) = [str(one.message) for one in recwarn if "the teacher" in str(one.message)]
    assert found.startswith(
        f"the teacher ddim:5 breaks at 2 of 7 seeds ({FIRST_SEED + 1}, {FIRST_SEED + 4}): values up"
    )
    recwarn.clear()
    name_broken({seed: 1.0 + 0.9 * (seed == 3) for seed in range(9)}, "ddim:5")
    name_broken({}, "ddim:5")
    assert not recwarn.list


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_lightning_predict(tmp_path, devices):
    """Two shards on 1, 2 and 3 processes, then a nearly finished resume."""
    for unfinished in (False, True):
        if unfinished:
            (tmp_path / "shard-00001.tar").unlink()
        predict(Toy(), tmp_path, devices)
        cache = TrajectoryCache(tmp_path)
        assert torch.equal(cache.load().states, run_teacher(Toy(), TEACHER, SEEDS[:7], torch.float64).states)
        assert len(read_shard(tmp_path / "shard-00001.tar", Nodes.of(TEACHER))) == 3
