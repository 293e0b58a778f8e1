"""Weights that are channel matrices per frequency band: projectors, ring, sampling, views, JSON, errors."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from solvers import Bands, NoiseSchedule, SolverError, SolverTable, named_solver, sample, start_noise
from solvers.table_json import table_from_dict, table_to_dict

SHAPES = [(3, 8, 8), (3, 7, 10), (3, 16, 9), (3, 5, 8, 6)]
EDGES = [(), (0.2,), (0.06, 0.12, 0.25)]


def bands_and_samples(edges, shape):
    space = Bands(edges, shape[0])
    return space, space.bind(shape, torch.device("cpu")), torch.randn(2, *shape, dtype=torch.float64)


def network(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
    return torch.tanh(1.3 * x + torch.sin(timestep / 100) + x.roll(1, -1) * 0.3)


def operator_table(table: SolverTable, space: Bands, scale: float = 0.2) -> SolverTable:
    """A scheduler's table with each weight disturbed differently in each band and channel."""
    torch.manual_seed(0)

    def disturbed(coef: Tensor) -> Tensor:
        weights = space.embed(coef)
        return weights + scale * torch.randn_like(weights) * coef.abs()[..., None, None, None]

    names = ("state_coef", "output_coef", "noise_coef")
    changes = {name: disturbed(getattr(table, name)) for name in names}
    return replace(table, space=space, **changes, state_support=None, output_support=None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("edges", EDGES)
def test_split_and_merge_are_inverse_and_measured_bands_add_up(edges, shape):
    _, bound, x = bands_and_samples(edges, shape)
    assert torch.allclose(bound.merge(bound.split(x)), x, atol=1e-12)
    squares = sum(part.square().sum() for part in bound.isometric(bound.split(x)))
    assert torch.allclose(squares, x.square().sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("edges", EDGES)
def test_weights_act_as_projectors_and_matrices(edges, shape):
    """Against the definition: mask the full spectrum, mix channels, sum the bands."""
    space, bound, x = bands_and_samples(edges, shape)
    weight = torch.randn(space.ops, dtype=torch.float64)
    fy, fx = (torch.fft.fftfreq(size, dtype=torch.float64) for size in shape[-2:])
    radius = (fy[:, None] ** 2 + fx**2).sqrt()
    limits = [0.0, *edges, 1.0]
    wanted = torch.zeros_like(x)
    for matrix, low, high in zip(weight, limits, limits[1:]):
        mask = (radius >= low) & (radius < high)
        band = torch.fft.ifft2(torch.fft.fft2(x) * mask).real
        wanted += torch.einsum("ab,nb...->na...", matrix, band)
    assert torch.allclose(bound.merge(bound.add(None, weight, bound.split(x))), wanted, atol=1e-12)


def test_many_rows_at_once_equal_row_by_row():
    space, bound, x = bands_and_samples((0.2,), (3, 8, 8))
    parts = torch.stack([bound.split(x), bound.split(x.flip(-1))])
    weights = torch.randn(4, 2, *space.ops, dtype=torch.float64)
    rows = [bound.add(bound.add(None, row[0], parts[0]), row[1], parts[1]) for row in weights]
    assert torch.allclose(bound.mix(weights, parts), torch.stack(rows), atol=1e-12)


@pytest.mark.parametrize("name", ["ddim:4", "unipc:5", "sa:4"])
@pytest.mark.parametrize("edges", EDGES)
def test_embedded_numbers_are_the_scalar_solver(name, edges):
    table = named_solver(name, NoiseSchedule.linear())
    embedded = operator_table(table, Bands(edges, 3), scale=0.0)
    noise = start_noise([1, 2], (3, 8, 8), torch.float64)
    fresh = torch.randn(table.num_rows, 2, 3, 8, 8, dtype=torch.float64)
    one, two = (sample(network, solver, noise, step_noise=fresh) for solver in (table, embedded))
    assert torch.allclose(one, two, atol=1e-10)
    assert torch.allclose(embedded.scalar_part().output_coef, table.output_coef)
    assert embedded.consistency().worst == pytest.approx(table.consistency().worst, abs=1e-12)


@pytest.mark.parametrize("name", ["ddim:5", "unipc:5"])
@pytest.mark.parametrize(("order", "start"), [(1, 0), (3, 1), (5, 0), (5, 2)])
def test_views_are_exact_for_operators(name, order, start):
    table = operator_table(named_solver(name, NoiseSchedule.linear()).guided(2.0, [0, 1]), Bands((0.1, 0.3), 3))
    table = replace(table, calls=table.calls)
    view = table.local(order, start)
    for block in ("start", "output", "noise"):
        assert torch.allclose(getattr(table.canonical(), block), getattr(view.canonical(), block), atol=1e-9)
    noise = start_noise([1, 2], (3, 8, 8), torch.float64)

    class Conditional:
        null_condition = staticmethod(torch.zeros_like)

        def __call__(self, x, timestep, condition):
            return network(x, timestep, None) + condition.reshape(-1, 1, 1, 1)

    images = [sample(Conditional(), solver, noise, torch.ones(2).double()) for solver in (table, view)]
    assert torch.allclose(*images, rtol=1e-9, atol=1e-8)


def test_canonical_form_of_operators_is_what_sampling_does():
    table = operator_table(named_solver("dpmpp:4", NoiseSchedule.linear()), Bands((0.15,), 3))
    noise, outputs = start_noise([4], (3, 8, 8), torch.float64), []

    def recorded(x, timestep, condition):
        outputs.append(network(x, timestep, condition))
        return outputs[-1]

    image = sample(recorded, table, noise)
    bound, canonical = table.space.bind((3, 8, 8), noise.device), table.canonical()
    total = bound.add(None, canonical.start[-1], bound.split(noise))
    for weight, output in zip(canonical.output[-1], outputs):
        total = bound.add(total, weight, bound.split(output))
    assert torch.allclose(bound.merge(total), image, atol=1e-10)


def test_operator_tables_round_trip():
    table = operator_table(named_solver("unipc:3", NoiseSchedule.linear()), Bands((0.1, 0.3), 3))
    again = table_from_dict(table_to_dict(table))
    assert again.space == table.space
    assert torch.equal(again.output_coef, table.output_coef)
    assert torch.equal(again.state_support, table.state_support)


def test_gradients_and_batches():
    table = operator_table(named_solver("ddim:3", NoiseSchedule.linear()), Bands((0.2,), 3))
    coef = table.output_coef.clone().requires_grad_()
    noise = start_noise([1, 2, 3], (3, 6, 6), torch.float64)
    trained = replace(table, output_coef=coef)
    image = sample(network, trained, noise)
    image.square().sum().backward()
    diagonal = coef.grad[range(3), range(3)]
    assert bool((diagonal != 0).all())
    alone = torch.cat([sample(network, table, noise[k : k + 1]) for k in range(3)])
    assert torch.allclose(image.detach(), alone, atol=1e-12)


@pytest.mark.parametrize(
    ("edges", "channels", "match"),
    [
        ((0.3, 0.1), 3, r"band edges are \[0.3, 0.1\]: they must increase"),
        ((0.0,), 3, "they must increase inside"),
        ((0.8,), 3, "they must increase inside"),
        ((0.1,), 0, "bands have 0 channels"),
    ],
)
def test_wrong_bands_are_refused(edges, channels, match):
    with pytest.raises(ValueError, match=match):
        Bands(edges, channels)


def test_samples_of_another_model_are_refused():
    table = operator_table(named_solver("ddim:2", NoiseSchedule.linear()), Bands((0.2,), 3))
    with pytest.raises(ValueError, match=r"matrices of 3 channels, the samples have shape \(4, 8, 8\)"):
        sample(network, table, torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"the samples have shape \(3, 8\)"):
        sample(network, table, torch.zeros(1, 3, 8))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"space": {"edges": [0.5, 0.1], "channels": 3}}, "the table's space is not valid: band edges"),
        ({"space": {"edges": [0.2], "channels": 2}}, r"state_coef has shape \(2, 2, 2, 3, 3\)"),
        ({"space": {"edges": [0.2]}}, "table.space misses channels"),
        ({"calls": [[0]]}, "table.calls holds"),
        ({"calls": [[0, "conditional"], [7, "conditional"]]}, "a call is made at row 7"),
    ],
)
def test_wrong_json_is_one_line(change, match):
    values = table_to_dict(operator_table(named_solver("ddim:2", NoiseSchedule.linear()), Bands((0.2,), 3)))
    with pytest.raises(SolverError, match=match) as error:
        table_from_dict(values | change)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
