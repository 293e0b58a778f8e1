"""Base-model training: targets, schedules, EMA, resume, two processes, the checkpoint folder."""

import copy
import json
from dataclasses import fields, replace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from base.module import BaseModel
from data.images import ImageData
from denoisers import load_denoiser
from denoisers.dit import DiT
from solvers.prediction import per_sample
from solvers.schedule import NoiseSchedule
from training.ema import EMA
from training.network import AdamW

NETWORK = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}
OPTIMIZER = AdamW(1e-3, warmup_steps=2, decay_fraction=1.0, betas=(0.9, 0.95))
SCHEDULES = {"epsilon": NoiseSchedule.linear(), "flow": NoiseSchedule.flow()}


def model(schedule: str = "epsilon", network: dict | None = None, **options) -> BaseModel:
    torch.manual_seed(0)
    names = {field.name for field in fields(AdamW)} & options.keys()
    optimizer = replace(OPTIMIZER, **{name: options.pop(name) for name in names})
    return BaseModel(DiT(SCHEDULES[schedule], **NETWORK | (network or {})), optimizer=optimizer, **options)


def digits(batch_size: int = 300) -> ImageData:
    return ImageData("digits", batch_size=batch_size, flip=False)


def trainer(folder, **options) -> Trainer:
    return Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": -1, "max_steps": 12, "limit_val_batches": 0} | options,
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def keep_all(folder, every: int) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_perfect_network_has_no_loss(schedule):
    """All data is one image d, so the noise is (x - alpha d) / sigma: the target is what the table's algebra says."""
    module, image = model(schedule), torch.rand(1, 1, 8, 8)

    def perfect(x, timestep, labels):
        alpha, sigma = (per_sample(value, x) for value in module.network.schedule.alpha_sigma(timestep.double()))
        noise = (x - alpha * image) / sigma
        return noise if schedule == "epsilon" else noise - image

    images, position = image.expand(16, -1, -1, -1), torch.linspace(0.1, 0.99, 16)
    generator = torch.Generator().manual_seed(0)
    loss = module._loss(perfect, images, torch.zeros(16, dtype=int), position, generator)
    assert loss < 1e-9
    zero = module._loss(lambda x, *_: 0 * x, images, torch.zeros(16, dtype=int), position, generator)
    assert zero > 0.9


def test_timesteps_at_quantiles():
    position = torch.tensor([0.0, 0.5, 0.8413447, 0.9999])
    assert model().timestep(position).tolist() == [0, 500, 841, 999]
    torch.testing.assert_close(model("flow").timestep(position), 1000 * position)
    logit_normal = model("flow", time_sampling="logit_normal").timestep(position)
    torch.testing.assert_close(logit_normal[1:3], 1000 * torch.tensor([0.0, 1.0]).sigmoid(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("fraction", "at_60"), [(1.0, 40 / 90), (0.5, 40 / 45), (0.25, 1.0)])
def test_rate_warms_up_and_ends_at_zero(monkeypatch, fraction, at_60):
    monkeypatch.setattr(Trainer, "estimated_stepping_batches", 100)
    module = model(warmup_steps=10, decay_fraction=fraction)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    rates = [module.rate(step) for step in range(101)]
    assert rates[0] == 0.1
    assert rates[9] == 1.0
    assert rates[60] == pytest.approx(at_60)
    assert rates[100] == 0.0


def test_label_dropout_gives_the_null_class(tmp_path):
    seen = {}
    for dropout in (0.0, 1.0):
        module = model(class_dropout=dropout)
        forward = module.network.forward
        module._predict = lambda x, t, y, d=dropout, f=forward: seen.setdefault(d, y) is None or f(x, t, y)
        trainer(tmp_path, max_steps=1).fit(module, digits())
    assert seen[0.0].max() == 9
    assert seen[1.0].unique().tolist() == [10]


class Record(Callback):
    """The network's weights after each step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append(copy.deepcopy(pl_module.network.state_dict()))


def test_ema_is_the_average_of_the_steps(tmp_path):
    module, record, ema = model(), Record(), EMA(decay=0.25)
    expected = module.network.state_dict()["final_layer.linear.bias"].clone()
    trainer(tmp_path, max_steps=4, callbacks=[ema, record]).fit(module, digits())
    for step, weights in enumerate(record.weights, start=1):
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights["final_layer.linear.bias"]
    torch.testing.assert_close(ema.network.state_dict()["final_layer.linear.bias"], expected)
    assert not torch.equal(expected, weights["final_layer.linear.bias"])


@pytest.mark.parametrize("stop", [3, 6])  # inside the first epoch of 5 batches, and inside the second
def test_resume_equals_an_uninterrupted_run(tmp_path, stop):
    module, ema = model(), EMA(0.9)
    trainer(tmp_path, max_steps=8, callbacks=[ema, keep_all(tmp_path, stop)]).fit(module, digits())
    again, again_ema = model(), EMA(0.9)
    path = tmp_path / f"step={stop}.ckpt"
    trainer(tmp_path, max_steps=8, callbacks=[again_ema]).fit(again, digits(), ckpt_path=path, weights_only=True)
    for one, other in ((module.network, again.network), (ema.network, again_ema.network)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_resume_at_the_end_of_an_epoch(tmp_path):
    module = model()
    trainer(tmp_path, max_steps=8, callbacks=[keep_all(tmp_path, 5)]).fit(module, digits())
    again = model()
    trainer(tmp_path, max_steps=8).fit(again, digits(), ckpt_path=tmp_path / "step=5.ckpt", weights_only=True)
    assert torch.equal(module.network.final_layer.linear.weight, again.network.final_layer.linear.weight)


def test_checkpoints_hold_the_network_and_its_average_alone(tmp_path):
    module = model()
    trainer(tmp_path, max_steps=2, callbacks=[EMA(), keep_all(tmp_path, 2)]).fit(module, digits())
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"network.{name}" for name in module.network.state_dict()}
    assert set(checkpoint["callbacks"]["EMA"]) == set(module.network.state_dict())


def gradients_of_a_step(folder, **options) -> torch.Tensor:
    """What the optimiser stepped along."""
    module = model()
    trainer(folder, max_steps=1, **options).fit(module, digits())
    return torch.cat([value.grad.flatten() for value in module.network.parameters() if value.grad is not None])


def half() -> MixedPrecision:
    """fp16 with the scaled losses of a GPU."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))


def test_gradients_are_clipped_as_asked(tmp_path):
    free = gradients_of_a_step(tmp_path)
    norm, largest = float(free.norm()), float(free.abs().max())
    by_norm = gradients_of_a_step(tmp_path, gradient_clip_val=norm / 4)
    torch.testing.assert_close(by_norm, free / 4, rtol=1e-4, atol=1e-9)
    by_value = gradients_of_a_step(tmp_path, gradient_clip_val=largest / 4, gradient_clip_algorithm="value")
    assert torch.equal(by_value, free.clamp(-largest / 4, largest / 4))


@pytest.mark.parametrize("share", [0.25, 4.0])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_scaled_gradients_are_unscaled_before_they_are_clipped(tmp_path, share, algorithm):
    free = gradients_of_a_step(tmp_path)
    limit = share * float(free.norm() if algorithm == "norm" else free.abs().max())
    options = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm}
    expected = gradients_of_a_step(tmp_path, **options)
    found = gradients_of_a_step(tmp_path, plugins=[half()], **options)
    assert float((found - expected).norm() / expected.norm()) < 0.02


def rank_loss(module: BaseModel, rank: int, batch: tuple) -> torch.Tensor:
    """What `training_step` computes on that rank."""

    class Ranked(type(module)):
        global_rank, current_epoch = rank, 0
        log = staticmethod(lambda *_, **__: None)

    twin = copy.copy(module)
    twin.__class__ = Ranked
    return twin.training_step(batch, 0)


def rank_batch(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first batch of 8 that a rank of two gets."""
    data = digits(batch_size=8)
    data.setup("fit")
    loader = data.train_dataloader()
    sampler = loader.batch_sampler
    sampler.rank, sampler.world_size, sampler.batch_size = rank, 2, 2 * sampler.batch_size
    images, labels = next(iter(loader))
    return images.double(), labels


@pytest.fixture
def _float64():
    """Random numbers are drawn in float64, as Lightning's 64-true precision does."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64")
def test_two_processes_average_their_gradients(tmp_path):
    """One step of two processes against the same step by hand, in float64 because Adam divides small by small."""
    alone, pair = model(), model()
    (sum(rank_loss(alone, rank, rank_batch(rank)) for rank in range(2)) / 2).backward()
    weights = [value for value in alone.network.parameters() if value.requires_grad]
    torch.optim.AdamW(weights, lr=alone.adamw.learning_rate / 2, betas=alone.adamw.betas, weight_decay=0.0).step()
    two = trainer(tmp_path, max_steps=1, devices=2, strategy="ddp_fork", precision="64-true")
    two.fit(pair, digits(batch_size=8))
    for name, value in alone.network.state_dict().items():
        torch.testing.assert_close(pair.network.state_dict()[name], value, atol=1e-9, rtol=0)


def test_training_learns_and_writes_the_average(tmp_path):
    """Predicting zero scores 1; the checkpoint folder holds the averaged weights."""
    network = {"patch_size": 2, "hidden_size": 32, "depth": 2}
    module = model(network=network, learning_rate=4e-3, output=str(tmp_path / "out"))
    ema = EMA(0.95)
    options = {"max_steps": 120, "limit_val_batches": 1, "check_val_every_n_epoch": None, "val_check_interval": 120}
    run = trainer(tmp_path, **options, callbacks=[ema], num_sanity_val_steps=0)
    run.fit(module, digits(batch_size=64))
    assert run.callback_metrics["val/loss"] < 0.45
    loaded = load_denoiser(tmp_path / "out")
    for name, value in ema.network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16().float())
    record = json.loads((tmp_path / "out/config.json").read_text())["training"]
    assert (record["steps"], record["images"]) == (120, 120 * 64)
    assert record["val/loss"] == pytest.approx(float(run.callback_metrics["val/loss"]))


def test_init_from_takes_another_models_weights(tmp_path):
    first = model(output=str(tmp_path / "first"))
    trainer(tmp_path, max_steps=2).fit(first, digits())
    second = model("flow", init_from=str(tmp_path / "first"))
    assert torch.equal(
        second.network.final_layer.linear.weight, load_denoiser(tmp_path / "first").final_layer.linear.weight
    )
    with pytest.raises(ValueError, match="do not fit the network"):
        model("flow", network={"hidden_size": 32}, init_from=str(tmp_path / "first"))
    with pytest.raises(ValueError, match=r"it has no model\.safetensors"):
        model(init_from=str(tmp_path / "nowhere"))


class Pictures:
    """Stands for a logger with pictures."""

    def __init__(self):
        self.images = []

    def log_image(self, key, images):
        self.images.append((key, images))


def test_samples_are_logged(tmp_path, monkeypatch):
    pictures = Pictures()
    monkeypatch.setattr(BaseModel, "logger", property(lambda self: pictures))
    for schedule in SCHEDULES:
        trainer(tmp_path, max_steps=2).fit(model(schedule, sample_every=2), digits())
    assert [key for key, _ in pictures.images] == ["pictures/base"] * 2
    assert pictures.images[0][1][0].shape == (4 * 18, 10 * 18, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_sampling": "x"}, "unknown time_sampling 'x'"),
        ({"time_sampling": "logit_normal"}, "is for flow schedules"),
        ({"class_dropout": 1.5}, r"class_dropout 1\.5"),
        ({"decay_fraction": -1}, "decay_fraction -1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)


def test_ema_decay_is_checked():
    with pytest.raises(ValueError, match="EMA decay 1"):
        EMA(decay=1)
