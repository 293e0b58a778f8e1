"""Guidance and conditions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from denoisers import (
    GuidedDenoiser,
    check_labels,
    class_labels,
    concatenate_conditions,
    condition_length,
    index_condition,
    with_guidance,
    with_precision,
    with_scale,
)
from solvers import NoiseSchedule, named_solver, sample, start_noise


class Labelled(nn.Module):
    """output = (label + 1) x timestep, the null class 3 gives label 9; counts its calls and batch sizes."""

    schedule, sample_shape, num_classes, name = NoiseSchedule.linear(), (2, 3, 3), 3, "labelled"

    def __init__(self, learned_variance: bool = False) -> None:
        super().__init__()
        self.linear, self.learned_variance, self.batches = nn.Linear(3, 3), learned_variance, []

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, 9)

    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        self.batches.append(len(x))
        weight = (condition + 1) * timestep
        output = x * weight[:, None, None, None].to(x.dtype)
        return torch.cat([output, 100 * output], 1) if self.learned_variance else output


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("timestep", [torch.tensor(2.5), torch.tensor([2.5, 1.0])])
def test_guidance_is_uncond_plus_scale_times_difference(learned_variance: bool, timestep: Tensor) -> None:
    """Of the two formulas in use the one that pipelines have; the paper's adds 1 (huggingface/diffusers #5882)."""
    denoiser = Labelled(learned_variance)
    x, labels = torch.randn(2, 2, 3, 3, dtype=torch.float64), torch.tensor([0, 2])
    output = GuidedDenoiser(denoiser, 4.0)(x, timestep, labels)
    weight = (10 + 4 * (torch.tensor([1.0, 3.0]) - 10)) * timestep
    assert torch.allclose(output, x * weight.double()[:, None, None, None], rtol=1e-12)
    assert denoiser.batches == [4]


@pytest.mark.parametrize("learned_variance", [False, True])
def test_a_range_takes_each_sample_at_its_own_scale(learned_variance: bool) -> None:
    denoiser = with_guidance(Labelled(learned_variance), [1, 5])
    assert denoiser.guidance_scale == (1.0, 5.0)
    x, labels, timestep = torch.randn(2, 2, 3, 3, dtype=torch.float64), torch.tensor([0, 2]), torch.tensor(2.5)
    output = denoiser(x, timestep, with_scale(denoiser, labels, torch.tensor([1.5, 4.0])))
    for index, scale in enumerate((1.5, 4.0)):
        alone = GuidedDenoiser(Labelled(learned_variance), scale)(x, timestep, labels)
        assert torch.equal(output[index], alone[index])
    assert with_scale(with_guidance(Labelled(), 2.0), labels, torch.ones(2)) is labels


@pytest.mark.parametrize(("own", "asked"), [(7.5, 1.0), (7.5, 2.0), (7.5, [1, 8]), ([1, 8], 7.5), ([1, 8], 1.0)])
def test_another_scale_than_its_own_is_refused(own: Any, asked: Any) -> None:
    denoiser = with_guidance(Labelled(), own)
    assert with_guidance(denoiser, own) is denoiser
    with pytest.raises(ValueError, match=r"the denoiser has guidance_scale .*, asked for is .*: give the same"):
        with_guidance(denoiser, asked)


def test_scale_one_is_the_bare_denoiser() -> None:
    denoiser = Labelled()
    assert with_guidance(denoiser, 1.0) is denoiser


def test_wrappers_pass_attributes_on() -> None:
    denoiser = with_guidance(with_precision(Labelled(), "bf16"), 2.0)
    assert (denoiser.guidance_scale, denoiser.num_classes, denoiser.name) == (2.0, 3, "labelled")
    assert denoiser.schedule == NoiseSchedule.linear()
    assert getattr(denoiser, "needs_node", False) is False


def test_guided_denoiser_is_what_the_sampler_runs() -> None:
    """A guided run equals the hand-written combination of two networks."""

    class Pair(Labelled):
        def forward(self, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
            return torch.tanh(x + condition[:, None, None, None] + timestep / 1000)

    pair, noise, labels = Pair(), start_noise([0, 1], (2, 3, 3), torch.float64), torch.tensor([1, 2])
    table = named_solver("dpmpp:5", pair.schedule)

    def by_hand(x: Tensor, timestep: Tensor, condition: Any) -> Tensor:
        conditional, unconditional = pair(x, timestep, labels), pair(x, timestep, torch.tensor([9, 9]))
        return unconditional + 3 * (conditional - unconditional)

    expected = sample(by_hand, table, noise)
    assert torch.allclose(sample(with_guidance(pair, 3.0), table, noise, labels), expected, rtol=1e-12)


def test_guidance_errors() -> None:
    with pytest.raises(ValueError, match="no null condition"):
        with_guidance(nn.Identity(), 2.0)
    with pytest.raises(ValueError, match=r"no null condition, so guidance_scale \[1.0, 2.0\]"):
        with_guidance(nn.Identity(), [1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        with_guidance(Labelled(), float("nan"))
    with pytest.raises(ValueError, match="guidance needs a condition"):
        with_guidance(Labelled(), 2.0)(torch.zeros(1, 2, 3, 3), torch.tensor(1.0))


def test_labels_follow_the_seed_and_are_checked() -> None:
    assert class_labels(Labelled(), [0, 5, 2**31]).tolist() == [0, 2, 2**31 % 3]
    assert class_labels(nn.Identity(), [0, 5]) is None
    assert check_labels(Labelled(), [2, 0]).tolist() == [2, 0]
    with pytest.raises(ValueError, match="label 3 is out of range: this denoiser has classes 0 to 2"):
        check_labels(Labelled(), [0, 3])
    with pytest.raises(ValueError, match="has no classes"):
        check_labels(nn.Identity(), [0])


def test_prompt_conditions_follow_the_seed() -> None:
    denoiser = nn.Identity()
    denoiser.conditions = {"a": torch.arange(3.0), "null": {"a": -torch.arange(3.0)}}
    chosen = class_labels(denoiser, [4, 2**31])
    assert chosen["a"].tolist() == [1.0, float(2**31 % 3)]
    assert chosen["null"]["a"].tolist() == [-1.0, -float(2**31 % 3)]


def test_nested_conditions_split_and_join() -> None:
    condition = {"a": torch.arange(4), "b": [torch.arange(8).reshape(4, 2), (torch.arange(4) * 2, None)]}
    assert condition_length(condition) == 4
    parts = [index_condition(condition, slice(0, 1)), index_condition(condition, torch.tensor([1, 2, 3]))]
    joined = concatenate_conditions(parts)
    assert joined["a"].tolist() == [0, 1, 2, 3]
    assert joined["b"][0].tolist() == condition["b"][0].tolist()
    assert joined["b"][1][0].tolist() == [0, 2, 4, 6]
    assert joined["b"][1][1] is None
    assert index_condition(condition, [2, 2])["a"].tolist() == [2, 2]
    assert index_condition(None, [0]) is None
    assert condition_length(None) is None


def test_condition_errors() -> None:
    with pytest.raises(ValueError, match=r"samples on dimension 0"):
        condition_length({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match="different structure"):
        concatenate_conditions([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}])
    with pytest.raises(ValueError, match="a condition holds a str"):
        index_condition({"a": "text"}, [0])
