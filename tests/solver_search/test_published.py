import json
from pathlib import Path

import pytest
import torch

from solver_search.parameters import PaperParameters
from solver_search.published import NUMBERS, published_nfes, published_table, write_artifacts
from solvers import NoiseSchedule, load_solver, sample, start_noise
from tests.analytic import gaussian_denoiser, gaussian_solution, two_point_denoiser

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "solvers" / "published"
KINDS = [(kind, nfe) for kind in ("vp", "rectified_flow") for nfe in published_nfes(kind)]
SCHEDULES = {"vp": NoiseSchedule.linear(), "rectified_flow": NoiseSchedule.flow()}


def _rule(entry, kind, noise, denoiser, schedule):
    """The authors' rule written out, the update applied once, on the schedule's nodes."""
    total, steps = sum(entry["timedeltas"]), entry["timedeltas"]
    start, end = (1.0, 0.0) if kind == "rectified_flow" else (0.999, 0.001)
    times = [start + (end - start) * sum(steps[:i]) / total for i in range(len(steps))] + [end]
    nodes = [schedule.alpha_sigma(torch.tensor(min(1000 * t, schedule.t_max), dtype=torch.float64)) for t in times]
    state, history = noise, []
    for i, (t, (a, s), (a1, s1)) in enumerate(zip(times, nodes, nodes[1:])):
        output = denoiser(state, torch.tensor(1000 * t, dtype=torch.float64))
        history.append(-output if kind == "rectified_flow" else (state - s * output) / a)
        earlier = entry["coeffs"][i][:i]
        mixed = sum(c * h for c, h in zip([*earlier, 1 - sum(earlier)], history))
        if kind == "rectified_flow":
            state = state + (s - s1) * mixed
        else:
            state = s1 / s * state + s1 * (a1 / s1 - a / s) * mixed
    return state


@pytest.mark.parametrize(("kind", "nfe"), KINDS)
def test_table_is_the_published_rule(kind, nfe):
    schedule, noise = SCHEDULES[kind], start_noise(range(4), (3,), torch.float64)
    denoiser = two_point_denoiser(schedule)
    expected = _rule(json.loads(NUMBERS.read_text())[kind][str(nfe)], kind, noise, denoiser, schedule)
    found = sample(denoiser, published_table(kind, nfe), noise)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "nfe"), KINDS)
def test_published_solver_beats_its_start_on_a_gaussian(kind, nfe):
    schedule, noise = SCHEDULES[kind], start_noise(range(256), (4,), torch.float64)
    denoiser = gaussian_denoiser(schedule)
    errors = []
    own = PaperParameters(schedule, nfe, finish="end")
    for table in (published_table(kind, nfe), own.table(own.initial())):
        end = torch.tensor(schedule.t_max if kind == "rectified_flow" else 999.0, dtype=torch.float64)
        stop = torch.tensor(0.0 if kind == "rectified_flow" else 1.0, dtype=torch.float64)
        exact = gaussian_solution(schedule, noise, end, stop)
        errors.append(float((sample(denoiser, table, noise) - exact).square().mean().sqrt()))
    assert errors[0] < 0.6 * errors[1]


def test_shipped_artifacts_are_what_the_converter_writes(tmp_path):
    """But for the last digits: processors differ in them."""
    for path in write_artifacts(tmp_path):
        fresh, shipped = load_solver(path), load_solver(SHIPPED / path.name)
        for name in ("timesteps", "alpha", "sigma", "state_coef", "output_coef"):
            torch.testing.assert_close(getattr(fresh, name), getattr(shipped, name), rtol=1e-12, atol=1e-14)
        assert "2505.21114" in shipped.info["config"]["source"]


def test_unknown_tables():
    with pytest.raises(ValueError, match="unknown kind 'x'"):
        published_nfes("x")
    with pytest.raises(ValueError, match="there are 5, 6, 7, 8, 9, 10"):
        published_table("vp", 4)


def test_finish_at_the_data_ends_without_noise():
    assert published_table("vp", 5, finish="data").sigma[-1] == 0
