from dataclasses import replace

import pytest
import torch
from timm.optim import Lion
from torch.func import jacfwd, jvp, vmap

from data.shards import Trajectories
from denoisers import Evaluations
from solver_search.lm import Damping, NormalEquations, linearize, lm_step, normal_equations
from solver_search.losses import Features, SearchLoss, Term, total
from solver_search.objective import Compute, Objective
from solver_search.parameters import FreeParameters, PaperParameters
from solver_search.starts import start_table
from solvers import Bands, NoiseSchedule, named_solver, sample_trace, start_noise
from solvers.nodes import Nodes
from tests.analytic import gaussian_denoiser, gaussian_solution
from tests.solver_search.toys import SHAPE, TwoPoints, teacher_path

VP = NoiseSchedule.linear()
LOSSES = {
    "endpoint": SearchLoss(),
    "paper": SearchLoss(endpoint=0.0, path=1.0, huber=1000.0),
    "feature": SearchLoss(endpoint=0.5, feature=2.0),
    "robust": SearchLoss(path=0.5, robust=0.1),
}


def _search(objective, parameters, theta, teacher, steps=25):
    damping = Damping()
    for _ in range(steps):
        result, before = objective.lm_step(parameters, theta, teacher, damping)
        assert result.loss <= before
        theta, damping = result.theta, result.damping
        if not result.moved:
            break
    return theta, objective.value(parameters, theta, teacher)


def _extractor(images):
    return images.flatten(1).tanh() @ torch.arange(8.0, dtype=torch.float64).reshape(4, 2).cos()


def _problem(name):
    schedule = NoiseSchedule.flow() if name == "flow" else NoiseSchedule.linear()
    denoiser = TwoPoints(schedule)
    teacher = teacher_path(denoiser, named_solver("euler:40" if name == "flow" else "ddim:40", schedule), 6)
    if name == "free":
        start = named_solver("unipc:4", schedule)
        return denoiser, FreeParameters(start, (schedule.t_min, schedule.t_max)), teacher
    return denoiser, PaperParameters(schedule, 4, reduce_last_rows=False), teacher


@pytest.mark.parametrize("name", ["flow", "vp", "free"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_rowwise_tangents_are_forward_mode_through_the_sampler(name, chunk):
    denoiser, parameters, teacher = _problem(name)
    theta = parameters.project(parameters.initial() + 0.1 * torch.randn(parameters.size, dtype=torch.float64))
    spent = Evaluations()
    run = linearize(denoiser, parameters, theta, teacher.noise, chunk=chunk, evaluations=spent)
    jacobian = jacfwd(lambda t: torch.stack(sample_trace(denoiser, parameters.table(t), teacher.noise).states[1:]))(
        theta
    )
    torch.testing.assert_close(torch.stack(run.tangents[1:]), jacobian.detach().movedim(-1, 0).transpose(0, 1))
    assert 0 < spent.tangent < len(teacher) * parameters.size * parameters.nfe
    if chunk is None:  # one pass for the value, one for the derivatives where there are any: not in row 0
        assert spent.forward == len(teacher) * (2 * parameters.nfe - (name != "free"))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["flow", "vp", "free"])
def test_gradient_of_the_normal_equations_is_that_of_the_loss(name, loss):
    denoiser, parameters, teacher = _problem(name)
    theta = parameters.project(parameters.initial() + 0.05).requires_grad_()
    equations = normal_equations(
        linearize(denoiser, parameters, theta, teacher.noise), LOSSES[loss], teacher, _extractor
    )
    table = parameters.table(theta)
    value = total(LOSSES[loss], table, sample_trace(denoiser, table, teacher.noise).states, teacher, _extractor)
    assert equations.loss == pytest.approx(float(value.detach()), rel=1e-10)
    torch.testing.assert_close(2 * equations.gradient, torch.autograd.grad(value, theta)[0], rtol=1e-8, atol=1e-9)


def test_micro_batches_and_processes_add_up():
    denoiser, parameters, teacher = _problem("vp")
    theta = parameters.initial()
    whole, pieces = (Objective(denoiser, SearchLoss(), compute=Compute(micro_batch=size)) for size in (6, 4))
    doubled = Objective(denoiser, SearchLoss(), compute=Compute(micro_batch=3), reduce=lambda value: 2 * value)
    expected = whole.equations(parameters, theta, teacher)
    for other in (pieces, doubled):
        found = other.equations(parameters, theta, teacher)
        torch.testing.assert_close(found.matrix, expected.matrix)
        torch.testing.assert_close(other.gradient(parameters, theta, teacher)[1], 2 * expected.gradient)
        assert found.loss == pytest.approx(expected.loss)


def test_micro_batches_leave_no_sample_alone():
    """A kernel distance of one image is undefined."""
    sizes, objective = [], Objective(TwoPoints(NoiseSchedule.linear()), SearchLoss(), compute=Compute(micro_batch=4))
    teacher = teacher_path(objective.denoiser, named_solver("ddim:2", NoiseSchedule.linear()), 9)
    assert float(objective.mean(teacher, lambda part: sizes.append(len(part)) or torch.ones(1))) == 1
    assert sizes == [3, 3, 3]


def test_curvature_of_some_samples_with_the_gradient_of_all():
    denoiser, parameters, teacher = _problem("vp")
    theta = parameters.initial()
    few = Objective(denoiser, SearchLoss(), compute=Compute(curvature_samples=2))
    mixed, all_ = few._quadratic(parameters, theta, teacher), Objective(denoiser, SearchLoss())
    torch.testing.assert_close(mixed.gradient, all_.equations(parameters, theta, teacher).gradient)
    torch.testing.assert_close(mixed.matrix, all_.equations(parameters, theta, teacher[:2]).matrix)
    _, loss = _search(few, parameters, theta, teacher, steps=10)
    _, best = _search(all_, parameters, theta, teacher, steps=10)
    assert loss < 1.5 * best + 1e-6


def test_teachers_own_solver_is_left_alone():
    schedule = NoiseSchedule.linear()
    denoiser = TwoPoints(schedule)
    for name in ("ddim", "unipc"):
        start = start_table(name, 6, schedule)
        teacher = teacher_path(denoiser, start, 4)
        parameters = FreeParameters(start, (schedule.t_min, schedule.t_max))
        objective = Objective(denoiser, SearchLoss(path=1.0))
        theta = parameters.initial()
        assert objective.value(parameters, theta, teacher) < 1e-28
        result, _ = objective.lm_step(parameters, theta, teacher, Damping())
        assert float((result.theta - theta).abs().max()) < 1e-6
        gradient = objective.gradient(parameters, theta, teacher)[1]
        assert float(gradient.abs().max()) < 1e-12


@pytest.mark.parametrize("kind", ["flow", "vp"])
def test_search_reaches_the_exact_solution_of_a_gaussian(kind):
    """Outputs are affine in the noise, so two free evaluations can meet the exact end; the optimum is zero."""
    schedule = NoiseSchedule.flow() if kind == "flow" else NoiseSchedule.linear()
    start = named_solver("euler:2" if kind == "flow" else "ddim:2", schedule)
    parameters = FreeParameters(start, (schedule.t_min, schedule.t_max))
    noise = start_noise(range(8), SHAPE, torch.float64)
    first, last = (torch.tensor(value, dtype=torch.float64) for value in (schedule.t_max, schedule.t_min))
    end = gaussian_solution(schedule, noise, first, last)
    alpha, sigma = (torch.stack(pair) for pair in zip(schedule.alpha_sigma(first), schedule.alpha_sigma(last)))
    teacher = Trajectories(torch.stack([noise, end], 1), None, None, tuple(range(8)), Nodes(alpha, sigma))
    objective = Objective(gaussian_denoiser(schedule), SearchLoss())
    theta, loss = _search(objective, parameters, parameters.initial(), teacher)
    # the last node of a VP start is sigma = 0, the teacher's is t = 0: the target is read at the student's node
    assert loss < 1e-16
    assert objective.rmse(parameters.table(theta), teacher) < 2e-2


def test_second_order_beats_first_order_on_fewer_evaluations():
    denoiser, parameters, teacher = _problem("vp")
    second, first = (Objective(denoiser, SearchLoss()) for _ in range(2))
    start = second.value(parameters, parameters.initial(), teacher)
    theta, loss = _search(second, parameters, parameters.initial(), teacher, steps=8)
    value = parameters.initial().requires_grad_()
    lion = Lion([value], lr=0.01)
    while first.evaluations.calls < 2 * second.evaluations.calls:
        value.grad = first.gradient(parameters, value, teacher)[1]
        lion.step()
    assert loss < 0.5 * first.value(parameters, value.detach(), teacher) < start
    assert float((theta - parameters.initial()).abs().max()) > 0.01


def test_damping_shortens_steps_until_the_loss_falls():
    equations = NormalEquations(torch.eye(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 1.0)
    theta = torch.zeros(1, dtype=torch.float64)
    result = lm_step(
        equations, theta, lambda t: 0.5 if float(t.abs()) < 0.3 else float("inf"), lambda t: t, Damping(1.0)
    )
    assert result.moved
    assert 0 < -float(result.theta) < 0.3
    result = lm_step(equations, theta, lambda t: float("nan"), lambda t: t, Damping(1.0))
    assert not result.moved
    assert result.damping.value > 1


def test_features_of_the_shipped_classifier_have_forward_mode_derivatives():
    features, generator = Features("checkpoints/cifar10-classifier"), torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 32, 32, generator=generator) * 1.6 - 0.8
    directions = torch.randn(3, *images.shape, generator=generator)
    slopes = vmap(lambda direction: jvp(features, (images,), (direction,))[1])(directions)
    weights = torch.randn(slopes.shape[1:], generator=generator)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((features(leaf) * weights).sum(), leaf)
    for slope, direction in zip(slopes, directions):
        assert (slope * weights).sum() == pytest.approx(float((gradient * direction).sum()), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("rows", [None, [0, 2]])
def test_tangents_of_calls_are_forward_mode_through_the_sampler(rows):
    """Tables that make the calls of guidance themselves, all or some of them."""
    parameters = FreeParameters(named_solver("unipc:3", VP).guided(2.0, rows), (0.0, 999.0))
    theta = 0.05 * torch.randn(parameters.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise, condition = start_noise([1, 2], (2, 3), torch.float64), torch.tensor([0.4, -0.7], dtype=torch.float64)

    def network(x, timestep, condition):
        return torch.tanh(x + torch.sin(timestep / 300) + condition.reshape(-1, 1, 1))

    network.null_condition = torch.zeros_like
    count = Evaluations()
    run = linearize(network, parameters, theta, noise, condition, chunk=4, evaluations=count)

    def states(values):
        return torch.stack(sample_trace(network, parameters.table(values), noise, condition).states)

    expected = torch.func.jacfwd(states)(theta)
    found = torch.stack([torch.zeros_like(run.tangents[-1]) if t is None else t for t in run.tangents])
    assert torch.allclose(torch.stack(run.states), states(theta), atol=1e-12)
    assert torch.allclose(found.movedim(1, -1), expected, atol=1e-10)
    assert count.forward >= 2 * parameters.nfe


def test_operators_are_not_for_second_order():
    space = Bands((), 2)
    table = named_solver("ddim:2", VP)
    weights = {name: space.embed(getattr(table, name)) for name in ("state_coef", "output_coef", "noise_coef")}
    operators = replace(table, space=space, **weights, state_support=None, output_support=None)
    parameters = FreeParameters(operators, (0.0, 999.0))
    assert parameters.size == 2 + 2 * 4 + 3 * 4
    assert torch.equal(parameters.table(parameters.initial()).output_coef, operators.output_coef)
    with pytest.raises(ValueError, match="this table has operators: use optimizer lbfgs"):
        linearize(lambda x, t, c: x, parameters, parameters.initial(), torch.zeros(1, 2, 3, 3))


def test_robust_loss_has_the_curvature_of_its_gradient():
    """Gauss-Newton's gradient is half the derivative of the value."""
    term = Term(0.7, 1, robust=0.3)
    residual = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(term.value(residual), residual)[0]
    curvature = term.curvature(residual.detach()) / residual.numel()
    assert torch.allclose(gradient / 2, curvature * residual.detach(), atol=1e-12)
    small = Term(0.7, 1, robust=1e6)
    assert float(small.value(residual)) == pytest.approx(float(Term(0.7, 1).value(residual)), rel=1e-9)
