"""Small tuning runs on two-point data."""

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from data.teacher_data import TeacherData
from data.trajectories import FIRST_SEED, generate_trajectories
from solvers import NoiseSchedule, named_solver
from tests.solver_search.toys import TwoPoints
from timestep_tuner.method import Descent, TimestepTuner, Tuning
from training.method import Run
from training.solver_training import SolverTraining
from training.testing import Evaluation

SCHEDULE = NoiseSchedule.linear()
COUNT = 32


def make_cache(folder, denoiser, count=COUNT):
    table = named_solver("ddim:16", SCHEDULE)
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    generate_trajectories(denoiser, table, seeds, folder, shard_size=16, dtype=torch.float64, progress=False)
    return str(folder)


def data(cache, **options) -> TeacherData:
    return TeacherData(cache, **{"holdout": 8, "batch_size": 8} | options)


def fit(tuner, source, folder=None, ckpt_path=None, **options):
    callbacks = [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)] if folder else []
    trainer = lightning.Trainer(
        **{"max_steps": -1, "max_epochs": -1, "accelerator": "cpu", "devices": 1, "logger": False} | options,
        callbacks=callbacks,
        enable_checkpointing=bool(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(tuner, datamodule=source, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def make(
    denoiser=None, solvers="ddim:4", output=None, guidance_scale=1.0, evaluation=None, **options
) -> SolverTraining:
    """Flat options of a tuner, those of its descent put into their group."""
    rate = {"learning_rate": 0.03} if options.get("optimizer") == "adam" else {}
    options = {"steps": 20} | rate | options
    descent = Descent(**{name: options.pop(name) for name in list(options) if name in Descent.__dataclass_fields__})
    method = TimestepTuner([solvers] if isinstance(solvers, str) else solvers, descent=descent, **options)
    denoiser, output = denoiser or TwoPoints(SCHEDULE), output and str(output)
    return SolverTraining(denoiser, method, output, guidance_scale, None, evaluation or Evaluation())


def opened(cache, *arguments, **options) -> Tuning:
    """A tuning that has not begun, without a trainer."""
    tuner = make(*arguments, **options)
    return tuner.method.begin(Run(tuner.denoiser, data(cache).open(tuner.denoiser, tuner.method.wanted)))


def learn(tuning: Tuning) -> Tuning:
    """The whole run, without a trainer."""
    loader = tuning.run.data.train_dataloader()
    while not tuning.done:
        for batch in loader:
            if not tuning.done:
                tuning.step(batch)
    return tuning
