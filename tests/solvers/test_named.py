"""Solvers by name: steps, spacings, end points, errors."""

import diffusers
import pytest
import torch
from diffusers.schedulers import AysSchedules

from solvers import (
    DenoiserIdentity,
    NoiseSchedule,
    baseline_names,
    default_solver,
    ipndm,
    named_solver,
    resolve_solver,
    sample,
    solver_names,
    start_noise,
    tabulate,
)
from tests.analytic import gaussian_denoiser, gaussian_solution

VP = NoiseSchedule.linear()
FLOW = NoiseSchedule.flow()
EDM = NoiseSchedule.edm()

# rows that a number of steps gives; everything else has as many rows as steps
FEWER = {
    **{(name, steps): rows for name in ("heun", "kdpm2") for steps, rows in ((6, 5), (16, 15))},
    **{("plms", 7): 6, ("plms", 16): 11, ("pndm", 16): 14},  # PNDM's n must divide the training steps
}
TOO_FEW = {("pndm", 6): 13, ("pndm", 7): 13}
ENDS_ABOVE_ZERO = {"deis", "sa", "tcd"}  # at the schedule's smallest noise level


@pytest.mark.parametrize("schedule", [VP, FLOW, EDM], ids=["vp", "flow", "edm"])
@pytest.mark.parametrize("steps", [6, 7, 16])
def test_every_name_keeps_to_its_steps_and_ends_at_the_image(schedule, steps):
    for name in solver_names(schedule):
        if (name, steps) in TOO_FEW:
            with pytest.raises(ValueError, match=f"too few steps: it needs at least {TOO_FEW[name, steps]}"):
                named_solver(f"{name}:{steps}", schedule)
            continue
        table = named_solver(f"{name}:{steps}", schedule)
        assert table.nfe == FEWER.get((name, steps), steps), name
        assert abs(float(table.alpha[-1]) - 1) < 2e-3, name
        assert float(table.sigma[-1]) < (0.011 if name in ENDS_ABOVE_ZERO else 1e-3), name
        assert table.unused_evaluations() == [], name
        assert table.prediction_type == schedule.prediction_type


@pytest.mark.parametrize(
    "schedule", [VP, FLOW, NoiseSchedule.continuous_vp(), EDM], ids=["vp", "flow", "continuous", "edm"]
)
def test_baselines_are_names(schedule):
    names = baseline_names(schedule)
    assert len(set(names)) == len(names)
    assert all(named_solver(f"{name}:5", schedule).nfe == 5 for name in names)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (VP, "ddim:100"),
        (FLOW, "euler:100"),
        (NoiseSchedule.continuous_vp(), "ipndm:100"),
        (EDM, "euler:100"),
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_every_schedule_has_a_default_solver(schedule, expected):
    assert default_solver(schedule) == expected
    assert named_solver(default_solver(schedule, 12), schedule).nfe == 12


def test_baselines_are_those_of_the_comparison():
    assert baseline_names(VP) == [
        f"{name}@{spacing}"
        for name in ("ddim", "dpmpp", "unipc", "deis", "ipndm")
        for spacing in ("linspace", "trailing")
    ]
    assert {"euler", "ipndm", "unipc", "dpmpp", "heun"} <= set(baseline_names(FLOW))
    assert named_solver("heun:8", FLOW).nfe == 7


@pytest.mark.parametrize(
    ("name", "timesteps"),
    [
        ("ddim:4", [999, 749, 499, 249]),
        ("ddim@linspace:4", [999, 749, 500, 250]),
        ("ddim@leading:4", [800, 600, 400, 200]),
        ("ipndm:4", [999, 749, 499, 249]),
        ("ipndm@linspace:4", [999, 749, 500, 250]),
        ("dpmpp:3", [999, 666, 332]),
        ("ipndm:3", [999, 666, 332]),
        ("euler@linspace:4", [999, 666, 333, 0]),
    ],
)
def test_spacings_of_a_discrete_schedule(name, timesteps):
    assert named_solver(name, VP).timesteps.tolist() == timesteps


@pytest.mark.parametrize(
    ("name", "sigmas"),
    [
        ("euler:4", [1, 0.75, 0.5, 0.25, 0]),
        ("ipndm:4", [1, 0.75, 0.5, 0.25, 0]),
        ("unipc:4", [1, 0.75, 0.5, 0.25, 0]),
        ("euler@linspace:4", [1, 0.667, 0.334, 0.001, 0]),
        ("heun:5", [1, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 0]),
        ("heun@linspace:5", [1, 0.5005, 0.5005, 0.001, 0.001, 0]),
    ],
)
def test_spacings_of_a_flow(name, sigmas):
    table = named_solver(name, FLOW)
    assert table.sigma.tolist() == pytest.approx(sigmas, abs=1e-5)
    assert table.timesteps.tolist() == pytest.approx([1000 * sigma for sigma in sigmas[:-1]], abs=1.01)


@pytest.mark.parametrize("name", ["euler:4", "heun:7", "ipndm:4", "unipc:4"])
def test_shift_and_units_of_a_flow(name):
    """sigma -> 3 sigma / (1 + 2 sigma); a network told times in [0, 1] gets them so."""
    table = named_solver(name, NoiseSchedule.flow(shift=3.0, timestep_scale=1.0))
    plain = named_solver(name, FLOW)
    assert table.sigma.tolist() == pytest.approx((3 * plain.sigma / (1 + 2 * plain.sigma)).tolist(), abs=1e-5)
    assert table.timesteps.tolist() == pytest.approx(table.sigma[:-1].tolist(), abs=1.1e-3)


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.scaled_linear(prediction_type="v_prediction"),
        NoiseSchedule.cosine(prediction_type="sample"),
        NoiseSchedule.from_betas(torch.linspace(1e-4, 0.04, 500).tolist()),
        NoiseSchedule.linear(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        NoiseSchedule.linear(num_train_timesteps=400, beta_end=0.05),
        FLOW,
        NoiseSchedule.flow(shift=2.0),
    ],
    ids=["scaled", "cosine", "betas", "zero-snr", "short", "flow", "shifted"],
)
def test_named_solvers_sample_the_schedule_they_are_made_for(schedule):
    """The exact network of Gaussian data leads to the exact solution; a wrong schedule would not."""
    table = named_solver("unipc:40", schedule)
    noise = start_noise([1, 2], (8,), torch.float64)
    exact = gaussian_solution(schedule, noise, torch.tensor(schedule.t_max), torch.tensor(0.0, dtype=torch.float64))
    image = sample(gaussian_denoiser(schedule), table, noise)
    assert float((image - exact).abs().max()) < 0.03


def test_continuous_schedules_have_ipndm():
    schedule = NoiseSchedule.continuous_vp()
    assert solver_names(schedule) == ["ipndm"]
    assert named_solver("ipndm:4", schedule).timesteps.tolist() == [1000, 750, 500, 250]


def test_ipndm_turns_other_predictions_into_noise_at_their_node():
    """With v outputs the states enter too: eps = sigma x + alpha v."""
    table = ipndm(NoiseSchedule.linear(prediction_type="v_prediction"), torch.tensor([900.0, 500.0]))
    plain = ipndm(VP, torch.tensor([900.0, 500.0]))
    alpha, sigma = table.alpha, table.sigma
    assert torch.allclose(table.output_coef, plain.output_coef * alpha[:-1])
    assert torch.allclose(table.state_coef, plain.state_coef + plain.output_coef * sigma[:-1])


@pytest.mark.parametrize(
    ("text", "schedule", "match"),
    [
        ("ddim", VP, "'ddim' is no solver: write name:steps, name@spacing:steps, .* with a name of ddim, ddpm"),
        ("ddim:eight", VP, "is no solver"),
        ("ddim:-3", VP, "is no solver"),
        ("", VP, "is no solver"),
        ("magic:8", VP, "unknown solver 'magic': for this discrete_vp schedule use one of ddim, ddpm, deis"),
        ("ddim:8", FLOW, "unknown solver 'ddim': for this flow schedule use one of dpmpp, euler, heun, ipndm"),
        ("heun@karras:9", VP, "heun has no spacing 'karras': use one of trailing, linspace, leading"),
        ("pndm@linspace:20", VP, "pndm has no spacing 'linspace'"),
        ("ddim:0", VP, "'ddim:0' has 0 steps: allowed are 1 to 1000"),
        ("ddim:1001", VP, "allowed are 1 to 1000"),
        ("plms:2", VP, "'plms:2' cannot be built .*: too few steps: it needs at least 3"),
        ("euler@linspace:1", VP, "one step of linspace spacing lies at timestep 0"),
        ("lcm:60", VP, "'lcm:60' cannot be built for this schedule"),
        (
            "heun:5",
            NoiseSchedule.linear(prediction_type="v_prediction", rescale_betas_zero_snr=True),
            "HeunDiscreteScheduler knows no rescale_betas_zero_snr",
        ),
        (
            "ipndm:5",
            NoiseSchedule.linear(prediction_type="v_prediction", rescale_betas_zero_snr=True),
            "iPNDM cannot start at alpha = 0",
        ),
        ("euler:5", NoiseSchedule.flow(prediction_type="sample"), "diffusers needs flow_prediction"),
    ],
)
def test_errors_are_one_clear_line(text, schedule, match):
    with pytest.raises(ValueError, match=match) as caught:
        named_solver(text, schedule)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("timesteps", "order", "match"),
    [
        ([900.0, 500.0], 5, "order is 5: iPNDM has orders 1 to 4"),
        ([500.0, 900.0], 4, "needed is a list of at least one that falls"),
        ([], 4, "needed is a list of at least one that falls"),
        ([1200.0], 4, "leave the schedule's range"),
    ],
)
def test_ipndm_errors(timesteps, order, match):
    with pytest.raises(ValueError, match=match):
        ipndm(VP, torch.tensor(timesteps), order)


def test_resolve_takes_names_and_paths():
    table = resolve_solver("dpmpp:6", VP)
    assert torch.equal(table.output_coef, named_solver("dpmpp:6", VP).output_coef)
    with pytest.raises(ValueError, match=r"there is no solver artifact 'missing\.json'"):
        resolve_solver("missing.json", VP)
    with pytest.raises(ValueError, match="unknown solver 'magic'"):
        resolve_solver("magic:3", VP)
    with pytest.raises(ValueError, match="is no solver: write name:steps, name@spacing"):
        resolve_solver("x" * 5000, VP)


def test_resolve_loads_an_artifact(tmp_path):
    from solvers import save_solver

    path = tmp_path / "solver.json"
    table = named_solver("unipc:6", VP)
    save_solver(table, path, DenoiserIdentity(VP), method="test")
    assert torch.equal(resolve_solver(str(path), VP).state_coef, table.state_coef)


@pytest.mark.parametrize("name", ["euler", "heun", "lcm", "ipndm"])
@pytest.mark.parametrize(("spacing", "last"), [("linspace", 1 / 1000), ("trailing", 1 / 8)])
def test_a_static_shift_is_applied_once(name, spacing, last):
    """diffusers itself shifts its smallest noise level, which is shifted already, once more where it gets no sigmas."""
    table = named_solver(f"{name}@{spacing}:{15 if name == 'heun' else 8}", NoiseSchedule.flow(shift=3.0))
    assert float(table.timesteps[-1]) == pytest.approx(1000 * 3 * last / (1 + 2 * last), rel=1e-6)
    assert float(table.timesteps[0]) == pytest.approx(1000)


@pytest.mark.parametrize("name", ["euler", "lcm", "ipndm", "unipc"])
def test_a_shift_can_end_at_a_noise_level(name):
    schedule = NoiseSchedule.flow(shift=2.0, shift_terminal=0.1)
    table = named_solver(f"{name}:8", schedule)
    assert float(table.timesteps[-1]) == pytest.approx(100, abs=1)  # UniPC truncates
    with pytest.raises(ValueError, match=r"'heun:7' cannot be built .* knows no shift_terminal"):
        named_solver("heun:7", schedule)


@pytest.mark.parametrize("rescale", [False, True])
def test_solvers_of_a_scaled_signal_to_noise_ratio_lie_on_its_nodes(rescale):
    scheduler = diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=rescale, prediction_type="v_prediction")
    schedule = NoiseSchedule.from_scheduler(scheduler)
    table = named_solver("ddim:4", schedule)
    alpha, sigma = schedule.alpha_sigma(table.timesteps)
    assert torch.allclose(table.alpha[:-1], alpha, atol=2e-3 if rescale else 1e-6)
    assert torch.allclose(table.sigma[:-1], sigma, atol=2e-3 if rescale else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_start_noise_is_the_same_whatever_torchs_defaults(dtype):
    expected = start_noise([0, 7], (3, 4))
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = start_noise([0, 7], (3, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


LISTS = [
    *[(name, VP, "[999,759,500,259]") for name in ("euler", "lcm", "tcd", "ddpm", "ddim", "dpmpp", "dpmpp3m", "heun")],
    ("ipndm", VP, "[999,749.5,500.25,1.5]"),
    *[(name, FLOW, "[1000,937.5,833.3,625]") for name in ("euler", "lcm", "unipc", "ipndm")],
    *[(name, EDM, "[1.0955,0.5,0,-1.5]") for name in ("euler", "ipndm")],
]


@pytest.mark.parametrize(("name", "schedule", "steps"), LISTS, ids=lambda value: getattr(value, "kind", value))
def test_a_list_of_timesteps_is_where_the_rows_lie_and_what_is_told(name, schedule, steps):
    """A shift, which belongs to spacings, does not move them."""
    shifted = NoiseSchedule.flow(shift=3.0) if schedule is FLOW else schedule
    table = named_solver(f"{name}@{steps}", shifted)
    wanted = [float(part) for part in steps[1:-1].split(",")]
    assert list(dict.fromkeys(table.timesteps.tolist())) == wanted
    nodes = schedule.alpha_sigma(table.timesteps)
    apart = torch.stack([table.alpha[:-1] - nodes[0], table.sigma[:-1] - nodes[1]]).abs()
    assert float(apart.max()) < 2e-5  # half a timestep is 1e-3; diffusers computes in float32
    assert float(table.alpha[-1]) == pytest.approx(1, abs=2e-3)


def test_a_list_is_the_pipelines_own():
    """diffusers' set_timesteps(timesteps=...) of a distilled model."""
    scheduler = diffusers.LCMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
    )
    own = tabulate(scheduler, None, set_timesteps={"timesteps": [999, 759, 499, 259]})
    table = named_solver("lcm@[999,759,499,259]", NoiseSchedule.scaled_linear())
    assert torch.equal(table.state_coef, own.state_coef)
    assert torch.equal(table.timesteps, own.timesteps)


@pytest.mark.parametrize(
    ("levels", "timesteps", "schedule"),
    [
        ("sigma[1,0.9375,0.625]", "[1000,937.5,625]", NoiseSchedule.flow(shift=3.0)),
        ("sigma[14.6146,6.4745,2.6946,0.6525,0]", "[999,850,645,233.05225]", NoiseSchedule.scaled_linear()),
    ],
)
def test_a_list_of_noise_levels_is_one_of_timesteps(levels, timesteps, schedule):
    one, other = (named_solver(f"euler@{steps}", schedule) for steps in (levels, timesteps))
    assert torch.allclose(one.timesteps, other.timesteps, atol=1e-4)
    assert torch.allclose(one.output_coef, other.output_coef, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [*(("unipc", s) for s in (FLOW, VP)), ("dpmpp", VP), ("deis", VP)],
)
def test_multistep_solvers_at_their_own_steps_are_themselves(name, schedule):
    """The list of a solver's own timesteps gives its table; of others, one that keeps to the nodes it is given."""
    own = named_solver(f"{name}:6", schedule)
    nodes = schedule.timestep(own.alpha[:-1], own.sigma[:-1])
    listed = named_solver(f"{name}@[{','.join(map(str, nodes.tolist()))}]", schedule)
    for part in ("state_coef", "output_coef", "sigma"):
        torch.testing.assert_close(getattr(listed, part), getattr(own, part), rtol=1e-4, atol=1e-4)
    other = named_solver(f"{name}@[900,710.5,444.25,90]", schedule)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([900, 710.5, 444.25, 90]))
    torch.testing.assert_close(other.sigma[:-1] / other.alpha[:-1], (sigma / alpha).double(), rtol=1e-4, atol=1e-5)
    assert other.timesteps.tolist() == [900, 710.5, 444.25, 90]


def test_the_karras_grid():
    """Even in the seventh root from 80 to 0.002; the first level is the schedule's own noise."""
    table = named_solver("ipndm@karras:5", FLOW)
    levels = (80 ** (1 / 7) + torch.arange(6) / 5 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    expected = [1, *(levels / (1 + levels))[1:5].tolist(), 0]
    assert table.sigma.tolist() == pytest.approx(expected, rel=1e-5)
    assert named_solver("unipc@karras:5", FLOW).sigma.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    low, high = (float(s / a) for a, s in map(VP.alpha_sigma, torch.tensor([VP.t_min, VP.t_max]).double()))
    assert high > 80
    assert low > 0.002
    lowest = named_solver("ipndm@karras:1000", VP)
    assert float(lowest.sigma[-2] / lowest.alpha[-2]) > low


def test_align_your_steps_are_the_published_timesteps():
    """Of Stable Diffusion 1.5 with ten, as diffusers has them; others lie between."""
    ten, twenty = (named_solver(f"dpmpp@ays:{steps}", NoiseSchedule.scaled_linear()) for steps in (10, 20))
    assert ten.timesteps.tolist() == pytest.approx(AysSchedules["StableDiffusionTimesteps"], abs=1)
    assert twenty.timesteps[::2].tolist() == ten.timesteps.tolist()
    with pytest.raises(ValueError, match="the grid ays does not lie in the schedule's noise levels"):
        named_solver("ipndm@ays:8", NoiseSchedule.linear(beta_start=1e-6, beta_end=2e-4))


def test_the_grid_of_dmn():
    table = named_solver("unipc@dmn:4", FLOW)
    assert table.sigma.tolist() == pytest.approx(
        [1, 2.4605 / 3.4605, 0.68026 / 1.68026, 0.091662 / 1.091662, 0], abs=2e-6
    )
    with pytest.raises(ValueError, match="the grid dmn is known for 2 to 10 evaluations, not for 12"):
        named_solver("ipndm@dmn:12", VP)


@pytest.mark.parametrize(
    ("text", "schedule", "message"),
    [
        ("lcm@[999,850.5]", VP, "takes whole timesteps only and would be at 999.00, 850.00: use euler or ipndm"),
        ("heun@[1000,500]", FLOW, "takes no list of steps"),
        ("euler@[500,600]", VP, r"the steps \[500,600\] do not fall"),
        ("euler@[nan]", VP, r"the steps \[nan\] do not fall|leave the schedule's range"),
        ("euler@[1200,600]", VP, r"timesteps \[1200.0, 600.0\] leave the schedule's range"),
        ("euler@sigma[200,1]", VP, r"noise levels \[200.0, 1.0\] leave the schedule's range \[0.01, 157.4\]"),
        ("euler@[]", FLOW, "is no list of steps"),
        ("euler@[1,b]", FLOW, "is no list of steps"),
        ("dpmpp@[1,0]", EDM, "takes no list of steps"),
        ("euler@sigma[90,1]", EDM, r"leave the schedule's range \[0.002, 80\]"),
        ("euler:4", NoiseSchedule.edm(prediction_type="sample"), "diffusers needs EDM's own: use ipndm"),
        ("magic@[1]", FLOW, "unknown solver 'magic'"),
    ],
)
def test_lists_that_are_refused(text, schedule, message):
    with pytest.raises(ValueError, match=message):
        named_solver(text, schedule)
