"""LD3: a sampler that knows only EDM's networks becomes a table."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.ld3 import LARGEST, SMALLEST, Edm, best_levels, released, traced
from solvers import NoiseSchedule, sample
from tests.test_peers import Toy


class AdamsBashforth:
    """Two steps in s, of a network that predicts noise and is asked at other levels than those of the steps."""

    def sample_simple(self, model_fn, x, timesteps, timesteps2, order, NFEs):
        before = None
        for row in range(NFEs):
            slope = model_fn(x, timesteps2[row].expand(len(x)), None, None)
            both = slope if before is None else 1.5 * slope - 0.5 * before
            x, before = x + (timesteps[row + 1] - timesteps[row]) * both, slope
        model_fn(x, timesteps2[-1].expand(len(x)), None, None)  # as released: of no use
        return x


@pytest.mark.parametrize(
    "schedule", [NoiseSchedule.flow(), NoiseSchedule.linear(), NoiseSchedule.edm()], ids=lambda one: one.kind
)
def test_the_table_draws_what_the_sampler_draws(schedule):
    steps = torch.tensor([LARGEST, 9.0, 2.0, 0.4, SMALLEST], dtype=torch.float64)
    told = steps * torch.tensor([1, 1.1, 0.9, 1.05, 1])
    trainer = SimpleNamespace(solver=AdamsBashforth(), steps=4, order=2, solver_extra_params={})
    noise = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = Toy(schedule)
    edm = Edm(schedule, network)
    drawn = trainer.solver.sample_simple(
        lambda x, level, *_: (x - edm(x, level)) / level.reshape(-1, 1, 1, 1), LARGEST * noise, steps, told, 2, 4
    )
    table = traced(trainer, (steps, told), schedule)
    torch.testing.assert_close(sample(network, table, noise), drawn, rtol=0, atol=1e-9)
    assert table.nfe == 4
    torch.testing.assert_close(table.sigma[:-1] / table.alpha[:-1], told[:-1].double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(table.timesteps, schedule.timestep(table.alpha[:-1], table.sigma[:-1]))


def test_a_folder_without_the_code_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no checkout of LD3"):
        released(tmp_path)


def test_the_steps_are_the_best_that_the_trainer_kept(tmp_path):
    torch.save({"params1": torch.ones(3), "best_t_steps": torch.arange(6.0)}, tmp_path / "best_v2.pt")
    steps, told = best_levels(tmp_path)
    assert (steps.tolist(), told.tolist()) == ([0, 1, 2], [3, 4, 5])
