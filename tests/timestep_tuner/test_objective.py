"""The losses of the rows against the formula written out, and against what they are for."""

from dataclasses import replace

import pytest
import torch

from data.clean_samples import noised
from data.shards import Trajectories
from denoisers import with_guidance
from solvers import NoiseSchedule, named_solver, row_noise, sample_trace, start_noise
from solvers.prediction import to_noise
from tests.solver_search.toys import SHAPE, Labelled, TwoPoints, teacher_path
from timestep_tuner.objective import Objective, first_rows
from timestep_tuner.ratios import Ratios

SCHEDULES = {
    "epsilon": NoiseSchedule.linear(),
    "sample": NoiseSchedule.linear(prediction_type="sample"),
    "v_prediction": NoiseSchedule.linear(prediction_type="v_prediction"),
    "flow_prediction": NoiseSchedule.flow(),
}


def make(prediction_type="epsilon", name="unipc:4", denoiser=None, kind="noise", **options) -> Objective:
    schedule = SCHEDULES[prediction_type]
    ratios = Ratios(named_solver(name, schedule), (schedule.t_min, schedule.t_max), **options)
    return Objective(denoiser or TwoPoints(schedule), ratios, schedule, kind)


def examples(count=6, first_seed=2**31, condition=None) -> Trajectories:
    seeds = tuple(range(first_seed, first_seed + count))
    data = start_noise([seed + 10**6 for seed in seeds], SHAPE, torch.float64).sign()
    return noised(data, condition, range(count), seeds)


def moved(objective: Objective) -> torch.Tensor:
    """Timesteps that are all different from the base's."""
    ratio = torch.linspace(0.7, 0.95, objective.ratios.size, dtype=torch.float64)
    return objective.ratios.timesteps(ratio.requires_grad_())


def by_hand(objective: Objective, timesteps, tried: Trajectories, own_states: bool) -> torch.Tensor:
    """The paper's loss, row after row and sample after sample of the formula."""
    table, denoiser, losses = objective.base, objective.denoiser, []
    told_next = torch.cat([table.timesteps, torch.zeros(1)])
    state = table.alpha[0] * tried.end + table.sigma[0] * tried.noise
    states, outputs = [], []
    for i in range(objective.ratios.size):
        if not own_states:
            state = table.alpha[i] * tried.end + table.sigma[i] * tried.noise
        states.append(state)
        outputs.append(denoiser(state, timesteps[i], tried.condition))
        after = sum(table.state_coef[i, j] * states[j] for j in range(i + 1))
        after = after + sum(table.output_coef[i, j] * outputs[j] for j in range(i + 1))
        for j in range(i + 1):
            after = after + table.noise_coef[i, j] * row_noise(tried.seeds, j, SHAPE, torch.float64)
        noise = [
            to_noise(table.prediction_type, x, denoiser(x, t, tried.condition), table.alpha[k], table.sigma[k])
            for x, t, k in ((state, table.timesteps[i], i), (after, told_next[i + 1], i + 1))
        ]
        losses.append((noise[0] - noise[1]).square().sum((1, 2, 3)).mean())
        state = after
    return torch.stack(losses)


@pytest.mark.parametrize("own_states", [False, True])
@pytest.mark.parametrize("name", ["ddim:4", "dpmpp:4", "unipc:4", "ddpm:3", "euler:4"])
@pytest.mark.parametrize("prediction_type", SCHEDULES)
def test_noise_loss_is_the_formula(prediction_type, name, own_states):
    if prediction_type == "flow_prediction" and name in ("ddim:4", "ddpm:3"):
        name = "ipndm:4"
    objective = make(prediction_type, name)
    timesteps, tried = moved(objective).detach(), examples()
    run = objective.sequential if own_states else objective.parallel
    torch.testing.assert_close(run(timesteps, tried), by_hand(objective, timesteps, tried, own_states))


def test_guidance_and_labels_reach_every_row():
    denoiser = with_guidance(Labelled(SCHEDULES["epsilon"]), 2.0)
    objective = make(denoiser=denoiser)
    tried = examples(condition=torch.arange(6) % 3)
    timesteps = moved(objective).detach()
    torch.testing.assert_close(objective.parallel(timesteps, tried), by_hand(objective, timesteps, tried, False))


@pytest.mark.parametrize("strategy", ["parallel", "sequential"])
@pytest.mark.parametrize("prediction_type", SCHEDULES)
def test_a_row_moves_only_its_own_timestep(prediction_type, strategy):
    """By central differences with the history as it is: an earlier row's timestep acts only through detached values."""
    objective = make(prediction_type, "unipc:4")
    tried, timesteps = examples(), moved(objective).detach()
    run = getattr(objective, strategy)
    for row in range(objective.ratios.size):
        told = timesteps.clone().requires_grad_()
        run(told, tried)[row].backward()
        assert torch.equal(told.grad.nonzero().flatten(), torch.tensor([row]))
        step = torch.zeros_like(timesteps)
        step[row] = 1e-2
        with torch.no_grad():
            slope = (run(timesteps + step, tried)[row] - run(timesteps - step, tried)[row]) / 2e-2
        torch.testing.assert_close(told.grad[row], slope, rtol=1e-4, atol=1e-7)


def test_sequential_rows_are_those_of_the_whole_run():
    objective, tried = make(), examples()
    timesteps = moved(objective).detach()
    every = objective.sequential(timesteps, tried)
    for row in range(objective.ratios.size):
        torch.testing.assert_close(objective.sequential(timesteps, tried, row), every[row : row + 1])


def test_evaluations_are_counted():
    objective, tried = make(name="ddim:5"), examples(count=7)
    objective.parallel(moved(objective), tried)
    assert (objective.evaluations.forward, objective.evaluations.backward) == (7 * 3 * 4, 7 * 2 * 4)
    objective = make(name="ddim:5")
    objective.sequential(moved(objective), tried, 2)
    assert (objective.evaluations.forward, objective.evaluations.backward) == (7 * (2 + 3), 7 * 2)


def exact_path(schedule, name: str, count=6) -> Trajectories:
    return teacher_path(TwoPoints(schedule), named_solver(name, schedule), count)


def test_trajectory_loss_is_the_distance_to_the_teacher():
    """A solver that is its own teacher has no loss; another one that of its states."""
    schedule = SCHEDULES["epsilon"]
    tried = exact_path(schedule, "ddim:8")
    same = make(name="ddim:8", kind="trajectory", free_last=True)
    for run in (same.parallel, same.sequential):
        assert run(same.base.timesteps, tried).max() < 1e-20
    coarse = make(name="ddim:4", kind="trajectory", free_last=True)
    assert torch.equal(coarse.base.timesteps, named_solver("ddim:8", schedule).timesteps[::2])
    states = sample_trace(TwoPoints(schedule), coarse.base, tried.noise).states
    expected = [(states[i] - tried.states[:, 2 * i]).square().sum((1, 2, 3)).mean() for i in range(1, 5)]
    torch.testing.assert_close(
        coarse.sequential(coarse.base.timesteps, tried), torch.stack(expected).detach(), rtol=1e-4, atol=1e-9
    )  # diffusers rounds the nodes of the two tables to float32


def test_parallel_trajectory_rows_start_at_the_teachers_states():
    schedule = SCHEDULES["epsilon"]
    tried = exact_path(schedule, "ddim:8")
    coarse = make(name="ddim:4", kind="trajectory", free_last=True)
    table, denoiser, expected = coarse.base, TwoPoints(schedule), []
    for i in range(4):
        x = tried.states[:, 2 * i]
        after = table.state_coef[i, i] * x + table.output_coef[i, i] * denoiser(x, table.timesteps[i])
        expected.append((after - tried.states[:, 2 * i + 2]).square().sum((1, 2, 3)).mean())
    torch.testing.assert_close(coarse.parallel(table.timesteps, tried), torch.stack(expected), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["noise", "trajectory"])
@pytest.mark.parametrize("prediction_type", SCHEDULES)
def test_descent_lowers_the_loss(prediction_type, kind):
    """Each row's loss is a function of one number: a few steps must lower their sum."""
    schedule = SCHEDULES[prediction_type]
    flow = prediction_type == "flow_prediction"
    objective = make(prediction_type, "euler:5" if flow else "ddim:5", kind=kind)
    tried = examples(count=64)
    if kind == "trajectory":
        tried = exact_path(schedule, "euler:40" if flow else "ddim:40", count=64)
    ratio = objective.ratios.initial().requires_grad_()
    optimizer = torch.optim.Adam([ratio], lr=0.02)
    before = objective.parallel(objective.base.timesteps, tried).detach()
    for _ in range(25):
        optimizer.zero_grad()
        objective.parallel(objective.ratios.timesteps(ratio), tried).sum().backward()
        optimizer.step()
        ratio.data = objective.ratios.project(ratio.data)
    after = objective.parallel(objective.ratios.timesteps(ratio.detach()), tried).detach()
    assert after.sum() < 0.95 * before.sum()


def test_first_rows_stop_early():
    schedule = SCHEDULES["epsilon"]
    table, denoiser = named_solver("unipc:5", schedule), TwoPoints(schedule)
    noise = examples().noise
    whole = sample_trace(denoiser, table, noise)
    part = sample_trace(denoiser, first_rows(table, table.timesteps, 3), noise)
    assert len(part.states) == 4
    for one, other in zip(part.states, whole.states):
        assert torch.equal(one, other)


class Nodes(TwoPoints):
    """Asks for its node, as thresholding does, and answers with it."""

    needs_node = True

    def forward(self, x, timestep, condition=None, node=None):
        alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in node)
        assert len(alpha) == len(x)
        return super().forward(x, timestep) + 0 * x + alpha - sigma


def test_denoisers_that_need_their_node_are_told_the_rows():
    objective = make(name="ddim:3", denoiser=Nodes(SCHEDULES["epsilon"]))
    table, tried = objective.base, examples()
    plain = TwoPoints(SCHEDULES["epsilon"])
    expected = []
    for i in range(2):

        def predicted(x, k):
            return plain(x, table.timesteps[k]) + table.alpha[k] - table.sigma[k]

        x = table.alpha[i] * tried.end + table.sigma[i] * tried.noise
        after = table.state_coef[i, i] * x + table.output_coef[i, i] * predicted(x, i)
        expected.append((predicted(x, i) - predicted(after, i + 1)).square().sum((1, 2, 3)).mean())
    torch.testing.assert_close(objective.parallel(table.timesteps, tried), torch.stack(expected))


def test_refusals():
    with pytest.raises(ValueError, match="unknown objective 'x'"):
        make(kind="x")
    with pytest.raises(ValueError, match="adds noise in its rows"):
        make(name="ddpm:4", kind="trajectory")
    base = named_solver("ddim:4", SCHEDULES["sample"])
    base = replace(base, sigma=torch.cat([base.sigma[:-1], torch.zeros(1, dtype=torch.float64)]))
    ratios = Ratios(base, (0.0, 999.0), free_last=True)
    with pytest.raises(ValueError, match="leave free_last off"):
        Objective(TwoPoints(SCHEDULES["sample"]), ratios, SCHEDULES["sample"])
