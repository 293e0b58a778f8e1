from dataclasses import replace

import pytest
import torch
from torch.func import jacrev

from solver_search.parameters import FreeParameters, PaperParameters
from solver_search.starts import Start, check_start, split_widest, start_table, widened
from solvers import NoiseSchedule, named_solver, sample, start_noise
from tests.solver_search.toys import SHAPE, TwoPoints

SCHEDULES = {
    "epsilon": NoiseSchedule.linear(),
    "v": NoiseSchedule.linear(prediction_type="v_prediction"),
    "sample": NoiseSchedule.cosine(prediction_type="sample"),
    "continuous": NoiseSchedule.continuous_vp(),
    "flow": NoiseSchedule.flow(),
}


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


@pytest.fixture
def noise():
    return start_noise(range(5), SHAPE, torch.float64)


def _theta(parameters, scale=0.3):
    return scale * torch.randn(parameters.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _free(table, schedule, **options):
    return FreeParameters(table, (schedule.t_min, schedule.t_max), **options)


@pytest.mark.parametrize("finish", ["data", "end"])
def test_zero_is_euler_or_ddim_exactly(schedule, finish, noise):
    parameters = PaperParameters(schedule, 5, finish=finish)
    table = parameters.table(parameters.initial())
    denoiser, state = TwoPoints(schedule), noise
    for row in range(5):
        output = denoiser(state, table.timesteps[row])
        (a, s), (a1, s1) = ((table.alpha[i], table.sigma[i]) for i in (row, row + 1))
        if schedule.kind == "flow":
            state = state + (s1 - s) * output
        else:
            data = {
                "epsilon": (state - s * output) / a,
                "v_prediction": (a * state - s * output) / (a**2 + s**2),
                "sample": output,
            }[schedule.prediction_type]
            state = a1 * data + s1 * (state - a * data) / s
    torch.testing.assert_close(sample(denoiser, table, noise), state, rtol=1e-12, atol=1e-12)


def test_nodes_start_and_end_where_the_paper_says():
    for name, times in {"epsilon": (999.0, 1.0), "continuous": (999.0, 1.0), "flow": (1000.0, 0.0)}.items():
        parameters = PaperParameters(SCHEDULES[name], 4, finish="end")
        table = parameters.table(_theta(parameters))
        alpha, sigma = SCHEDULES[name].alpha_sigma(torch.tensor(times[1]))
        assert float(table.timesteps[0]) == pytest.approx(times[0], abs=1e-9)
        assert (float(table.alpha[-1]), float(table.sigma[-1])) == (float(alpha), float(sigma))


def test_rows_keep_to_their_nodes(schedule):
    parameters = PaperParameters(schedule, 7)
    assert parameters.table(_theta(parameters)).consistency().worst < 0.3
    assert parameters.table(parameters.initial()).consistency().worst < 1e-12
    affine = parameters.table(torch.cat([_theta(parameters)[:7], torch.zeros(21, dtype=torch.float64)]))
    assert affine.consistency().worst < 1e-12


def test_free_numbers_and_the_last_rows_of_few_steps():
    for nfe, weights in {1: 0, 2: 1, 4: 3, 5: 5, 6: 6 + 2, 7: 21, 10: 45}.items():
        assert PaperParameters(NoiseSchedule.flow(), nfe).size == nfe + weights
    parameters = PaperParameters(NoiseSchedule.flow(), 5)
    used = parameters.table(parameters.initial()).output_support
    assert used.tolist()[3:] == [[False, False, True, True, False], [False, False, False, True, True]]


def test_published_numbers_come_back():
    parameters = PaperParameters(NoiseSchedule.flow(), 3, reduce_last_rows=False)
    table = parameters.table(parameters.theta([0.2, 0.3, 0.6], [[0, 0, 0], [-1.5, 0, 0], [0.5, -0.25, 0]]))
    assert table.sigma.tolist() == pytest.approx([1, 1 - 0.2 / 1.1, 1 - 0.5 / 1.1, 0], abs=1e-15)
    assert (table.output_coef[2] / (table.sigma[3] - table.sigma[2])).tolist() == pytest.approx([0.5, -0.25, 0.75])
    with pytest.raises(ValueError, match=r"found \(2,\) step sizes"):
        parameters.theta([1, 1], [[0, 0], [0, 0]])
    with pytest.raises(ValueError, match="must be positive"):
        parameters.theta([1, 1, -1], [[0] * 3] * 3)
    with pytest.raises(ValueError, match="reduce_last_rows=False"):
        PaperParameters(NoiseSchedule.flow(), 3).theta([1, 1, 1], [[0, 0, 0], [0, 0, 0], [1, 0, 0]])


def test_prediction_types_are_the_same_solver(noise):
    results = []
    for kind in ("epsilon", "v_prediction", "sample"):
        schedule = NoiseSchedule.linear(prediction_type=kind)
        parameters = PaperParameters(schedule, 4)
        results.append(sample(TwoPoints(schedule), parameters.table(_theta(parameters)), noise))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[2], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["unipc", "dpmpp", "deis", "ipndm", "ddim"])
def test_free_starts_at_any_table(name):
    schedule = NoiseSchedule.linear()
    start = named_solver(f"{name}:6", schedule)
    for canonical in (False, True):
        parameters = _free(start, schedule, canonical=canonical)
        table = parameters.table(parameters.initial())
        assert torch.equal(table.timesteps, start.timesteps)
        torch.testing.assert_close(table.canonical().output, start.canonical().output, rtol=1e-12, atol=1e-12)
        assert bool(table.output_support.tril().eq(torch.ones(6, 6).tril().bool()).all())


@pytest.mark.parametrize("canonical", [False, True])
def test_a_last_row_that_is_kept(canonical):
    """Only the timestep it is told moves; the rows before move as without it."""
    schedule = NoiseSchedule.linear()
    start = named_solver("unipc:4", schedule)
    parameters = _free(start, schedule, keep_last_row=True, canonical=canonical)
    table = parameters.table(_theta(parameters))
    for name in ("state_coef", "output_coef"):
        assert torch.equal(getattr(table, name)[-1], getattr(start, name)[-1])
        assert not torch.equal(getattr(table, name)[-2], getattr(start, name)[-2])
    assert float(table.timesteps[-1]) != float(start.timesteps[-1])
    torch.testing.assert_close(parameters.table(parameters.initial()).canonical().output, start.canonical().output)
    assert list(parameters.moving_rows) == [0, 1, 2]


def test_the_papers_start_has_no_last_row_to_keep():
    schedule = SCHEDULES["epsilon"]
    with pytest.raises(
        ValueError, match="keep_last_row keeps the last row of a solver, and the paper's start has none"
    ):
        Start(["dpmpp", "paper"], keep_last_row=True)
    parameters = Start("dpmpp", keep_last_row=True).parameters(4, schedule, named_solver("dpmpp:4", schedule))
    assert parameters.keep_last_row


def test_every_free_number_moves_the_table():
    schedule = NoiseSchedule.linear()
    parameters = _free(named_solver("unipc:4", schedule), schedule)

    def numbers(theta):
        table = parameters.table(theta)
        return torch.cat([table.timesteps, table.state_coef.flatten(), table.output_coef.flatten()])

    jacobian = jacrev(numbers)(parameters.initial())
    assert bool((jacobian != 0).any(0).all())
    assert parameters.size == torch.linalg.matrix_rank(jacobian)


@pytest.mark.parametrize("kind", ["paper", "free"])
@pytest.mark.parametrize("name", ["epsilon", "flow"])
def test_gradients_match_finite_differences(kind, name, noise):
    schedule = SCHEDULES[name]
    parameters = PaperParameters(schedule, 3, reduce_last_rows=False)
    if kind == "free":  # begins inside the range, so that finite differences stay in it
        parameters = _free(parameters.table(parameters.initial()), schedule)
        start = replace(parameters.start, timesteps=parameters.start.timesteps.clamp(max=schedule.t_max - 100))
        parameters = _free(start, schedule)
    denoiser = TwoPoints(schedule)
    theta = parameters.project(_theta(parameters, 0.05)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda values: sample(denoiser, parameters.table(values), noise[:1]), theta, eps=1e-7, atol=1e-4, rtol=1e-3
    )


def test_timesteps_stay_in_the_schedule():
    schedule = NoiseSchedule.linear()
    parameters = _free(named_solver("dpmpp:4", schedule), schedule)
    table = parameters.table(parameters.project(torch.full((parameters.size,), 9.0, dtype=torch.float64)))
    assert table.timesteps.tolist() == [999.0] * 4
    table = parameters.table(parameters.project(torch.full((parameters.size,), -9.0, dtype=torch.float64)))
    assert table.timesteps.tolist() == [0.0] * 4


@pytest.mark.parametrize("name", ["unipc", "ddim", "flow"])
def test_one_evaluation_more_changes_nothing(name, noise):
    schedule = NoiseSchedule.flow() if name == "flow" else NoiseSchedule.linear()
    table = named_solver("euler:4" if name == "flow" else f"{name}:4", schedule)
    split = split_widest(table, schedule)
    denoiser = TwoPoints(schedule)
    assert split.nfe == 5
    assert split.unused_evaluations()
    torch.testing.assert_close(sample(denoiser, split, noise), sample(denoiser, table, noise), rtol=1e-11, atol=1e-11)
    assert torch.equal(split.state_support, split.state_coef != 0)
    every = torch.ones(4, 4, dtype=torch.bool).tril()
    supports = split_widest(replace(table, state_support=every, output_support=every), schedule)
    assert int(supports.output_support.sum()) > int(split.output_support.sum())
    if name != "unipc":
        assert split.consistency().worst < 1e-6


def test_refused_starts():
    schedule = NoiseSchedule.linear()
    table = named_solver("dpmpp:5", schedule)
    with pytest.raises(ValueError, match="has 5 evaluations, the search has 6: start from a solver of 6"):
        check_start(table, "x", 6, schedule)
    with pytest.raises(ValueError, match="combines epsilon outputs, the denoiser gives flow_prediction"):
        check_start(table, "x", 5, NoiseSchedule.flow())
    with pytest.raises(ValueError, match="adds noise"):
        start_table("ddpm", 5, schedule)
    with pytest.raises(ValueError, match="a warm start cannot run this solver, which has network calls of its own"):
        widened(table.guided(2.0), 12, schedule)
    with pytest.raises(ValueError, match="needs one without"):
        FreeParameters(named_solver("ddpm:5", schedule), (0.0, 999.0))
    with pytest.raises(ValueError, match="no solver artifact"):
        start_table("nothing-{nfe}.json", 5, schedule)
    with pytest.raises(ValueError, match="unknown finish"):
        PaperParameters(schedule, 5, finish="x")
    with pytest.raises(ValueError, match="they must fall"):
        PaperParameters(schedule, 5, start=0.1, end=0.5)
