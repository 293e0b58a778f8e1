import pytest
import torch

from evaluation.distances import KernelTo
from evaluation.extractors import load_extractor
from evaluation.statistics import load_statistics
from solver_search.losses import Features, SearchLoss, Term, total
from solvers import NoiseSchedule, named_solver
from tests.solver_search.toys import TwoPoints, teacher_path


def test_teacher_between_its_states_is_a_partial_step_of_ddim():
    schedule = NoiseSchedule.linear()
    table = named_solver("ddim:10", schedule)
    denoiser = TwoPoints(schedule)
    teacher = teacher_path(denoiser, table, 3)
    alpha, sigma = schedule.alpha_sigma(550.0)
    row = int((table.timesteps > 550).sum()) - 1
    a, s = table.alpha[row], table.sigma[row]
    output = denoiser(teacher.states[:, row], table.timesteps[row])
    expected = alpha * (teacher.states[:, row] - s * output) / a + sigma * output
    torch.testing.assert_close(teacher.at(alpha, sigma), expected, rtol=1e-9, atol=1e-9)


def test_teacher_at_its_own_nodes():
    for schedule, name in ((NoiseSchedule.linear(), "ddim:6"), (NoiseSchedule.flow(), "euler:6")):
        table = named_solver(name, schedule)
        teacher = teacher_path(TwoPoints(schedule), table, 2)
        for i in range(7):
            torch.testing.assert_close(teacher.at(table.alpha[i], table.sigma[i]), teacher.states[:, i])


def test_ends_alone_are_enough_for_the_end():
    table = named_solver("euler:6", NoiseSchedule.flow())
    teacher = teacher_path(TwoPoints(NoiseSchedule.flow()), table, 2)
    ends = teacher.ends()
    assert ends.states.shape[1] == 2
    assert torch.equal(ends.at(table.alpha[-1], table.sigma[-1]), teacher.end)


def test_loss_is_the_weighted_sum_of_its_parts():
    table = named_solver("euler:3", NoiseSchedule.flow())
    teacher = teacher_path(TwoPoints(NoiseSchedule.flow()), table, 2)
    states = [teacher.states[:, i] + 0.1 * i for i in range(4)]
    loss = SearchLoss(endpoint=2.0, path=3.0, huber=1000.0, huber_delta=0.001, feature=5.0)
    path = (0.01 + 0.04 + 0.09) / 3
    expected = 2 * 0.09 + 3 * path + 1000 * 0.001 * (0.3 - 0.0005) + 5 * (0.3 * 4) ** 2
    found = total(loss, table, states, teacher, lambda images: images.flatten(1).sum(1, keepdim=True))
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_huber_curvature_reproduces_its_slope():
    term, residual = Term(7.0, 1, delta=0.05), torch.tensor([0.01, -0.04, 0.3, -2.0], dtype=torch.float64)
    leaf = residual.clone().requires_grad_()
    slope = torch.autograd.grad(term.value(leaf), leaf)[0] * len(residual)
    torch.testing.assert_close(2 * term.curvature(residual) * residual, slope)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoint": -1.0}, "none may be negative"),
        ({"endpoint": 0.0}, "one must be positive"),
        ({"kernel": -1.0}, "none may be negative"),
        ({"huber_delta": 0.0}, "huber_delta is 0.0"),
    ],
)
def test_bad_losses(options, message):
    with pytest.raises(ValueError, match=message):
        SearchLoss(**options)


def test_kernel_part_is_the_distance_of_the_last_states_to_the_data():
    folder = "checkpoints/cifar10-classifier"
    statistics = f"{folder}/reference_statistics.safetensors"
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    images = ((images + 1) * 127.5).round() / 127.5 - 1  # as the extractor of the figures rounds them
    extractor = load_extractor(folder)
    data = load_statistics(statistics, extractor)
    expected = KernelTo(data.features)(extractor(images)[0])
    table = named_solver("euler:1", NoiseSchedule.flow())
    loss = SearchLoss(endpoint=0.0, kernel=3.0)
    found = total(loss, table, [images * 0, images], None, Features(folder, statistics))
    assert float(found) == pytest.approx(3 * expected, rel=1e-5)
