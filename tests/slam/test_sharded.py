"""FSDP2 over two processes: the student, its slower average and a resumed run are those of DDP."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from denoisers import load_denoiser
from slam.export import Exports
from slam.module import SLAM
from slam.objective import Objective
from tests.slam.prompt_data import PromptData
from tests.slam.test_pipelines import GUIDANCE, tiny_model
from training.checkpoints import use_checked
from training.ema import EMA
from training.network import AdamW
from training.sharded import Sharded

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
STEPS = 3


def fit(model: Path, output: Path, strategy: Any, lora_rank: int | None, **options: Any) -> None:
    """A training with the slower average, which is exported, and a checkpoint of each step."""
    torch.manual_seed(0)
    made = {"objective": Objective(teacher_points=10), "optimizer": AdamW(3e-3), "exports": Exports((1,))}
    module = SLAM(str(model), str(output), guidance_scale=GUIDANCE, sample_every=0, lora_rank=lora_rank, **made)
    processes = {"accelerator": "cpu", "devices": 2, "use_distributed_sampler": False, "strategy": strategy}
    keep = ModelCheckpoint(output, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = lightning.Trainer(**QUIET, **processes, max_steps=STEPS, callbacks=[EMA(0.6, "student"), keep])
    trainer.fit(module, datamodule=PromptData(str(model)), **options)


def sharded_rank(rank: int, port: int, model: Path, folder: Path, lora_rank: int | None) -> None:
    """One of two processes, as torchrun starts them: a whole run, and one that goes on from its first step."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="slam")
    for name, options in (("sharded", {}), ("resumed", {"ckpt_path": folder / "sharded" / "step=1.ckpt"})):
        strategy = Sharded("gloo")
        use_checked(strategy)
        fit(model, folder / name, strategy, lora_rank, **options)


@pytest.mark.parametrize(("kind", "lora_rank"), [("flux", None), ("wan", None), ("wan", 2)])
def test_a_sharded_student_and_its_average_equal_those_of_ddp(kind: str, lora_rank: int | None, tmp_path: Path) -> None:
    model = tiny_model(kind, tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, model, tmp_path, lora_rank)
    torch.multiprocessing.start_processes(sharded_rank, arguments, nprocs=2, start_method="fork")
    fit(model, tmp_path / "ddp", "ddp_fork", lora_rank)
    names = "sharded", "resumed", "ddp"
    sharded, resumed, whole = (load_denoiser(tmp_path / name / "student").state_dict() for name in names)
    assert all(torch.equal(resumed[name], sharded[name]) for name in sharded)
    before = load_denoiser(model).state_dict()
    moved = torch.cat([(whole[name] - before[name]).abs().flatten() for name in whole])
    differ = torch.cat([(sharded[name] - whole[name]).abs().flatten() for name in whole])
    assert moved.mean() > 1e-4
    saved = torch.load(tmp_path / "sharded" / "step=1.ckpt", weights_only=True)
    names = [*saved["state_dict"], *saved["callbacks"]["EMA"]]
    assert all("lora_" in name or "gamma_embedding" in name for name in names) == bool(lora_rank)
    assert (differ > 1e-5).float().mean() < 0.01  # Adam turns gradients of nothing but rounding into whole steps


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_a_student_is_sharded_from_the_shell(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind, tmp_path / "model")
    ema = {"class_path": "training.ema.EMA", "init_args": {"decay": 0.6, "attribute": "student"}}
    student = {"teacher": str(model), "output": str(tmp_path / "out"), "guidance_scale": GUIDANCE}
    config = {
        "trainer": {**QUIET, "enable_checkpointing": False, "accelerator": "cpu", "max_steps": 2, "callbacks": [ema]},
        "model": {"class_path": "slam.module.SLAM", "init_args": {**student, "objective": {"teacher_points": 10}}},
        "data": {"class_path": "tests.slam.prompt_data.PromptData", "init_args": {"model": str(model)}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py", "fit"]
    sharded = ["--trainer.strategy.class_path", "training.sharded.Sharded", "--trainer.devices", "2"]
    backend = ["--trainer.strategy.init_args.process_group_backend", "gloo"]
    subprocess.run([*launch, "--config", str(tmp_path / "config.yaml"), *sharded, *backend], check=True)
    assert load_denoiser(tmp_path / "out" / "student").weight_hash != load_denoiser(model).weight_hash
