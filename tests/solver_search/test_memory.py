import pytest
import torch
from torch import nn

from solver_search.losses import SearchLoss
from solver_search.memory import Checkpointed, activation_bytes, describe, estimate, readable
from solver_search.objective import Compute, Objective
from solver_search.parameters import PaperParameters
from solvers import NoiseSchedule, named_solver, sample_trace, start_noise
from tests.solver_search.toys import SHAPE, teacher_path


class Deep(nn.Module):
    """A network that keeps much more than its input."""

    def __init__(self, depth: int = 12) -> None:
        super().__init__()
        self.schedule, self.sample_shape = NoiseSchedule.flow(), SHAPE
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth)).double()

    def forward(self, x, timestep, condition=None):
        value = x.flatten(1)
        for layer in self.layers:
            value = layer(value).tanh() + timestep / 1000
        return value.reshape(x.shape)


def _kept(denoiser, nfe: int) -> int:
    """Bytes autograd keeps for a run of `nfe` evaluations."""
    parameters = PaperParameters(NoiseSchedule.flow(), nfe)
    theta = parameters.initial().requires_grad_()
    kept, alive = {}, []

    def pack(value):
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        alive.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        alive.append(sample_trace(denoiser, parameters.table(theta), start_noise(range(64), SHAPE, torch.float64)))
    return sum(kept.values())


def test_checkpointed_memory_grows_by_states_not_by_activations():
    denoiser = Deep().requires_grad_(False)
    state = 64 * 4 * 8
    plain, recomputed = (_kept(wrap, 8) - _kept(wrap, 4) for wrap in (denoiser, Checkpointed(denoiser)))
    assert plain > 4 * 12 * state
    assert recomputed < 4 * 6 * state


def test_checkpointing_changes_no_gradient():
    denoiser = Deep().requires_grad_(False)
    teacher = teacher_path(denoiser, named_solver("euler:10", denoiser.schedule), 4)
    parameters = PaperParameters(denoiser.schedule, 4)
    plain, saving = (
        Objective(denoiser, SearchLoss(path=1.0), compute=Compute(gradient_checkpointing=flag))
        for flag in (False, True)
    )
    expected, found = (o.gradient(parameters, parameters.initial() + 0.1, teacher) for o in (plain, saving))
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-14)
    assert plain.evaluations.calls == 4 * 4 * 3
    assert saving.evaluations.calls == 4 * 4 * 4


def test_estimate_counts_evaluations():
    denoiser, x, t = Deep(), torch.zeros(8, *SHAPE, dtype=torch.float64), torch.tensor(500.0)
    one = activation_bytes(denoiser, x, t)
    assert 12 * 8 * 4 * 8 <= one <= 40 * 8 * 4 * 8
    assert activation_bytes(denoiser, x.repeat(2, 1, 1, 1), t) == pytest.approx(2 * one, rel=0.1)
    states = 2 * 5 * 8 * 4 * 8
    assert estimate(denoiser, x, t, None, 5, False) == pytest.approx(5 * one + states, rel=0.1)
    assert estimate(denoiser, x, t, None, 5, True) == pytest.approx(one + states, rel=0.1)


def test_description_names_its_figure():
    denoiser = Deep().float()
    assert "48 tangents of 6 evaluations, micro-batch 4" in describe(denoiser, None, 4, 6, False, 48)
    assert "activations of 6 evaluations; see gradient_checkpointing" in describe(denoiser, None, 4, 6, False)
    assert readable(3 * 2**20) == "3 MB"
