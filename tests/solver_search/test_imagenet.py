"""The configs of the paper's models, run on random weights of one narrow block through the same loading code."""

import pytest
import torch

import train
from denoisers.dit import DiT
from solvers import NoiseSchedule, load_solver

MODELS = {
    "sit-xl2-imagenet256": ("SiT-XL-2-256x256.pt", NoiseSchedule.flow(), "euler:6"),
    "dit-xl2-imagenet256": ("DiT-XL-2-256x256.pt", NoiseSchedule.linear(), "ddim:6"),
}


@pytest.mark.parametrize("name", MODELS)
def test_paper_run_on_reduced_weights(name, tmp_path):
    file, schedule, teacher = MODELS[name]
    network = DiT(schedule, 32, 2, 4, hidden_size=64, depth=1, num_heads=1, num_classes=1000, learn_sigma=True)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.05)
    torch.save(network.state_dict(), tmp_path / file)
    model, data = "--model.init_args.", "--data.init_args."
    method = f"{model}method.init_args."
    train.main(
        ["fit", "--config", f"configs/solver_search/{name}.yaml", "--trainer.logger", "false"]
        + ["--trainer.accelerator", "cpu", "--trainer.callbacks", "null", "--trainer.enable_checkpointing", "false"]
        + [
            "--trainer.enable_progress_bar",
            "false",
            "--trainer.enable_model_summary",
            "false",
        ]
        + [f"{model}denoiser", str(tmp_path / file), f"{model}output", str(tmp_path)]
        + [f"{method}nfe", "[5]", f"{method}descent.steps", "2", f"{data}teacher", teacher]
        + [f"{data}limit", "4", f"{data}batch_size", "2", f"{data}holdout", "2"]
    )
    table = load_solver(tmp_path / "solver-search-5.json", guidance_scale=1.375)
    info = table.info
    assert info["schedule"]["kind"] == schedule.kind
    assert info["config"]["optimizer"] == "lion"
    assert float(table.sigma[-1]) == (0.0 if schedule.kind == "flow" else float(schedule.alpha_sigma(1.0)[1]))
    # forward: two steps of two fresh teachers and students, recomputed in the backward pass; two held out, judged twice
    spent = info["fitted_on"]["evaluations"]
    forward, backward = 2 * (2 * 6 + 2 * 2 * 5) + 2 * 2 * 6, 2 * 2 * 5
    assert spent == {"forward": forward, "backward": backward, "tangent": 0, "calls": forward + 2 * backward}
    assert float(table.timesteps.diff().std()) > 0.5  # Lion moved the even steps
