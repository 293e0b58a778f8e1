"""A tiny network, SLAM on it, and a trainer, for the tests of this folder."""

from dataclasses import fields

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from data.images import ImageData
from denoisers.dit import DiT
from slam.export import Exports
from slam.module import SLAM
from slam.objective import Objective
from solvers import NoiseSchedule
from training.network import AdamW

NETWORK = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2}
SCHEDULES = {
    "epsilon": NoiseSchedule.linear(),
    "v_prediction": NoiseSchedule.linear(prediction_type="v_prediction"),
    "sample": NoiseSchedule.linear(prediction_type="sample"),
    "flow": NoiseSchedule.flow(),
}


def network(schedule="epsilon", **options) -> DiT:
    torch.manual_seed(0)
    dit = DiT(SCHEDULES[schedule], **NETWORK | options)
    with torch.no_grad():
        for parameter in dit.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return dit


DEFAULTS = {"guidance_scale": 1.5, "learning_rate": 1e-3, "warmup_steps": 2, "weighting": "snr", "teacher_points": 10}
GROUPS = {"objective": Objective, "optimizer": AdamW, "exports": Exports}


def grouped(options: dict) -> dict:
    """Each option in the group that has it."""
    names = {name: {field.name for field in fields(kind)} for name, kind in GROUPS.items()}
    groups = {name: GROUPS[name](**{key: options[key] for key in names[name] & options.keys()}) for name in GROUPS}
    return groups | {key: value for key, value in options.items() if not any(key in found for found in names.values())}


def make(schedule="epsilon", teacher=None, **options) -> SLAM:
    torch.manual_seed(1)
    return SLAM(teacher or network(schedule), **grouped(DEFAULTS | options))


def digits(batch_size=200, **options) -> ImageData:
    return ImageData("digits", batch_size=batch_size, flip=False, **options)


def trainer(folder=None, **options) -> lightning.Trainer:
    return lightning.Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": -1, "max_steps": 3, "logger": False} | options,
        default_root_dir=folder,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in options.get("callbacks", [])),
        use_distributed_sampler=False,
    )


def keep_all(folder, every=1) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)


def same(one, other, tolerance=0.0):
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=0, atol=tolerance, check_dtype=False, msg=name)


def differs(one, other):
    return any(not torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
