"""SLAM with Lightning: what is trained, resume, processes, export, and what is refused."""

import copy
import json
import math

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from denoisers import load_denoiser
from denoisers.dit import DiT
from denoisers.gamma import Student, with_gamma
from slam.lora import plain_weights
from slam.module import SLAM
from slam.objective import Weights
from solvers import NoiseSchedule, load_solver, named_solver
from tests.slam.tiny import NETWORK, SCHEDULES, differs, digits, grouped, keep_all, make, network, same, trainer
from training.checkpoints import verify
from training.ema import EMA


def test_a_student_starts_as_the_teacher():
    teacher = network("flow", convention="sit")
    student = with_gamma(teacher)
    assert isinstance(student, Student)
    x, timestep, labels = torch.randn(5, 1, 8, 8), torch.rand(5) * 999, torch.arange(5)
    expected = teacher(x, timestep, labels)
    assert torch.equal(student(x, timestep, labels), expected)
    assert torch.equal(student(x, timestep, labels, gamma=torch.rand(5)), expected)


def test_gamma_one_is_no_gamma_whatever_the_weights():
    student = with_gamma(network())
    torch.nn.init.normal_(student.gamma_embedding.mlp[2].weight)
    x, timestep, labels = torch.randn(5, 1, 8, 8), torch.rand(5) * 999, torch.arange(5)
    plain = student(x, timestep, labels)
    assert torch.equal(student(x, timestep, labels, gamma=torch.ones(5)), plain)
    assert not torch.allclose(student(x, timestep, labels, gamma=torch.full((5,), 0.9)), plain, atol=1e-3)


def test_networks_without_students_are_refused():
    with pytest.raises(ValueError, match="Linear cannot be distilled, because its network takes no gamma"):
        with_gamma(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("method", ["slam", "consistency"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_prediction_types_train(schedule, method):
    module = make(schedule, method=method, learning_rate=3e-3)
    before = copy.deepcopy(module.student)
    losses = Losses()
    trainer(max_steps=30, callbacks=[losses]).fit(module, digits(100))
    assert sum(losses.values[-5:]) < 0.8 * sum(losses.values[:5])
    assert differs(module.student, before)
    gamma = module.student.gamma_embedding
    assert differs(gamma, before.gamma_embedding) == (method == "slam")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_second_order_teacher_trains_another_student(schedule):
    students = []
    for teacher_step in ("ddim", "heun"):
        module = make(schedule, teacher_step=teacher_step)
        losses = Losses()
        trainer(max_steps=5, callbacks=[losses]).fit(module, digits(100))
        assert all(math.isfinite(loss) for loss in losses.values)
        students.append(module.student)
    assert differs(*students)


@pytest.mark.parametrize(("teacher_step", "each"), [("ddim", 4), ("heun", 6)])
def test_calls_spent_count_all_evaluations(monkeypatch, teacher_step, each):
    """Student, target, and the guided teacher's two calls, once or twice."""
    module, spent = make(teacher_step=teacher_step), []
    monkeypatch.setattr(module, "examine", lambda name, table, calls: spent.append(calls))
    trainer(max_steps=2).fit(module, digits(100))
    assert set(spent) == {each * 200}


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.values.append(float(outputs["loss"]))


def test_plain_consistency_is_slam_at_gamma_one(monkeypatch):
    batch = torch.randn(6, 1, 8, 8), torch.arange(6)
    found = []
    for method in ("slam", "consistency"):
        module = make(method=method)
        module.trainer = trainer()
        monkeypatch.setattr(module, "log", lambda *_, **__: None)
        if method == "slam":
            monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.ones(*shape, dtype=options["dtype"]))
        found.append(module.training_step(batch, 0))
    assert torch.equal(*found)
    assert found[0] > 0


def test_the_target_is_the_average_of_the_student():
    module, record = make(target_decay=0.75), Students()
    expected = copy.deepcopy(module.target.state_dict())
    trainer(max_steps=6, accumulate_grad_batches=2, callbacks=[record]).fit(module, digits(60))
    assert len(record.weights) == 6
    for weights in record.weights:
        for name, value in weights.items():
            expected[name] = 0.75 * expected[name] + 0.25 * value
    for name, value in module.target.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


class Students(Callback):
    """The student's weights after each optimiser step."""

    def __init__(self):
        self.weights, self.step = [], 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self.weights.append(copy.deepcopy(pl_module.student.state_dict()))


@pytest.mark.parametrize("stop", [3, 10])  # inside the first epoch of eight batches, and inside the second
def test_resume_equals_an_uninterrupted_run(tmp_path, stop):
    whole, ema = make(output=str(tmp_path / "whole")), EMA(0.9, "student")
    trainer(max_steps=12, callbacks=[ema, keep_all(tmp_path, stop)]).fit(whole, digits())
    path = tmp_path / f"step={stop}.ckpt"
    saved = torch.load(path, weights_only=True)
    assert {name.partition(".")[0] for name in saved["state_dict"]} == {"student", "target"}
    again, again_ema = make(output=str(tmp_path / "again")), EMA(0.9, "student")
    torch.nn.init.normal_(again.student.gamma_embedding.mlp[0].weight)  # the checkpoint decides
    trainer(max_steps=12, callbacks=[again_ema]).fit(again, digits(), ckpt_path=path, weights_only=True)
    for name in ("student", "target"):
        same(getattr(whole, name), getattr(again, name))
    same(ema.network, again_ema.network)
    assert whole.images == again.images == 12 * 200
    hashes = [load_solver(tmp_path / run / "slam-4.json").info["denoiser"]["weight_hash"] for run in ("whole", "again")]
    assert hashes[0] == hashes[1]


@pytest.fixture
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class PerRank(SLAM):
    """Without randomness, so that two processes can be compared with one."""

    def _weights(self, batch, batch_idx):
        index = torch.arange(batch) % len(self.points.start)
        return Weights.of(self.schedule, self.points[index], torch.full((batch,), 0.5))

    def training_step(self, batch, batch_idx):
        data, _ = batch
        kept, torch.randn = torch.randn, lambda *_, **__: torch.roll(data, 1, -1)
        try:
            return super().training_step(batch, batch_idx)
        finally:
            torch.randn = kept


def run_equal(kind, batch_size, **options):
    torch.manual_seed(1)
    given = {"guidance_scale": 1.5, "teacher_points": 4, "steps": (1,), "learning_rate": 1e-3}
    module = kind(network("flow"), **grouped(given))
    trainer(max_steps=2, precision="64-true", **options).fit(module, digits(batch_size))
    return module


@pytest.mark.usefixtures("_float64")
def test_two_processes_equal_one_with_the_doubled_batch():
    """Ranks take turns in the permutation: of rank 0's and 1's samples, equal indices meet equal sub-paths."""
    pair = run_equal(PerRank, 8, devices=2, strategy="ddp_fork")
    single = run_equal(Interleaved, 16)
    for name in ("student", "target"):
        same(getattr(pair, name), getattr(single, name), 1e-8)


class Interleaved(PerRank):
    """One process whose sub-paths repeat each index, as two ranks would have them."""

    def _weights(self, batch, batch_idx):
        index = (torch.arange(batch) // 2) % len(self.points.start)
        return Weights.of(self.schedule, self.points[index], torch.full((batch,), 0.5))


def test_teacher_keeps_its_own_dtype():
    module = make(teacher_dtype="bfloat16")
    assert {value.dtype for value in module.teacher.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in module.student.parameters()} == {torch.float32}
    trainer(max_steps=2, precision="bf16-mixed").fit(module, digits())
    assert {value.dtype for value in module.teacher.parameters()} == {torch.bfloat16}
    assert module.trainer.callback_metrics["train/loss"] > 0


def test_gradient_checkpointing_changes_nothing():
    plain, saving = make(), make(gradient_checkpointing=True)
    assert saving.student.gradient_checkpointing
    assert not saving.target.gradient_checkpointing
    for module in (plain, saving):
        trainer(max_steps=2).fit(module, digits())
    same(plain.student, saving.student, 1e-6)


def test_lora_trains_adapters_and_exports_ordinary_weights(tmp_path):
    module = make(lora_rank=2, output=str(tmp_path))
    names = {name for name, value in module.student.named_parameters() if value.requires_grad}
    assert all("lora_" in name or name.startswith("gamma_embedding") for name in names)
    assert any("attn.qkv.lora_A" in name for name in names)
    trainer(max_steps=4).fit(module, digits())
    plain = plain_weights(module.target)
    assert set(plain) == set(with_gamma(network()).state_dict())
    merged = with_gamma(network())
    merged.load_state_dict(plain)
    x, timestep, labels = torch.randn(3, 1, 8, 8), torch.tensor([900.0, 500.0, 20.0]), torch.arange(3)
    torch.testing.assert_close(merged(x, timestep, labels), module.target(x, timestep, labels), rtol=1e-4, atol=1e-5)
    assert differs(merged, with_gamma(network()))
    loaded = load_denoiser(tmp_path / "student")
    for name, value in plain.items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16().float())


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), NoiseSchedule.flow(), NoiseSchedule.continuous_vp()])
def test_the_reference_is_a_solver_of_the_teachers_schedule(schedule):
    module = make(teacher=DiT(schedule, **NETWORK))
    assert named_solver(module.default_reference, schedule).num_rows == 10


class Pictures(lightning.pytorch.loggers.CSVLogger):
    """Takes pictures."""

    def __init__(self, folder):
        super().__init__(folder)
        self.images = {}

    def log_image(self, key, images):
        self.images[key] = images


def test_pictures_losses_and_throughput_are_logged(tmp_path):
    logger = Pictures(tmp_path)
    trainer(max_steps=2, logger=logger, log_every_n_steps=1).fit(make(sample_every=2), digits())
    assert set(logger.images) == {"pictures/slam-1", "pictures/slam-2", "pictures/slam-4"}
    assert logger.images["pictures/slam-1"][0].shape == (4 * 18, 10 * 18, 3)
    metrics = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert "train/loss" in metrics
    for name in ("images_per_second", "learning_rate", "gradient_norm"):
        assert f"train/{name}" in metrics


def test_the_last_samples_are_always_logged(tmp_path):
    logger = Pictures(tmp_path)
    trainer(max_steps=2, logger=logger).fit(make(sample_every=100), digits())
    assert set(logger.images) == {"pictures/slam-1", "pictures/slam-2", "pictures/slam-4"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "x"}, "unknown method 'x': use one of slam, consistency"),
        ({"noise_level": "x"}, "unknown noise_level 'x'"),
        ({"teacher_step": "x"}, "unknown teacher_step 'x': use one of ddim, heun"),
        ({"line_timestep": "x"}, "unknown line_timestep 'x': use one of start, node"),
        ({"weighting": "x"}, "unknown weighting 'x'"),
        ({"loss": "x"}, "unknown loss 'x'"),
        ({"huber_c": 0.0}, r"huber_c 0\.0 must be positive"),
        ({"target_decay": 1.0}, r"target_decay 1\.0 must lie in \[0, 1\)"),
        ({"decay_fraction": 2.0}, r"decay_fraction 2\.0 must lie in \[0, 1\]"),
        ({"steps": ()}, "steps is empty"),
        ({"steps": (11,)}, "is sampled in 1 to 10 steps, not 11"),
        ({"teacher_points": 0}, "teacher_points is 0"),
        ({"teacher_dtype": "int8"}, "unknown teacher_dtype 'int8'"),
        ({"learning_rate": 0.0}, r"learning_rate 0\.0 must be positive"),
        ({"betas": (0.9, 1.0)}, r"betas \(0\.9, 1\.0\) must lie in \[0, 1\)"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"teacher": torch.nn.Linear(1, 1)}, "the teacher Linear has no `schedule`"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_an_unknown_prediction_type_is_refused(tmp_path):
    from denoisers.checkpoint import save_denoiser

    save_denoiser(network(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["schedule"]["prediction_type"] = "score"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unknown prediction type 'score'"):
        SLAM(str(tmp_path))


def test_data_that_do_not_fit_are_refused_before_training():
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\), the denoiser takes \(1, 16, 16\)"):
        trainer().fit(make(teacher=network(input_size=16)), digits())
    with pytest.raises(ValueError, match=r"label \d is out of range"):
        trainer().fit(make(teacher=network(num_classes=3)), digits())
    loader = torch.utils.data.DataLoader([(torch.zeros(4, 4, 4), torch.tensor(0))], batch_size=1)
    with pytest.raises(ValueError, match=r"shape \(4, 4, 4\), the teacher takes \(1, 8, 8\)"):
        trainer().fit(make(), loader)
    loader = torch.utils.data.DataLoader([(torch.zeros(2, 1, 8, 8), torch.zeros(3, dtype=int))], batch_size=None)
    with pytest.raises(ValueError, match="2 samples have 3 conditions"):
        trainer().fit(make(), loader)


def sharded_rank(rank, port, folder):
    """One of two processes of FSDP2, as torchrun starts them."""
    import os

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="slam",
    )
    from training.checkpoints import use_checked
    from training.sharded import Sharded

    def fit(steps, **options):
        strategy = Sharded("gloo")
        use_checked(strategy)
        module = make("flow", output=str(folder / "sharded"), steps=(1,))
        running = trainer(max_steps=steps, strategy=strategy, devices=2)
        running.fit(module, digits(50), **options)
        return running

    fit(1).save_checkpoint(folder / "one.ckpt")
    fit(2, ckpt_path=folder / "one.ckpt", weights_only=True)


@pytest.mark.skipif(not hasattr(torch.distributed, "fsdp"), reason="without FSDP2")
def test_sharded_training_equals_ddp(tmp_path):
    """Student, target and teacher are sharded over two processes; checkpoints and the export are whole."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(sharded_rank, (port, tmp_path), nprocs=2, start_method="fork")
    verify(tmp_path / "one.ckpt")
    module = make("flow", output=str(tmp_path / "ddp"), steps=(1,))
    trainer(max_steps=2, strategy="ddp_fork", devices=2).fit(module, digits(50))
    sharded, whole = (load_denoiser(tmp_path / name / "student") for name in ("sharded", "ddp"))
    same(sharded, whole, 4e-3)  # stored in bf16
    assert differs(whole, with_gamma(network("flow")).bfloat16().float())
