"""bf16 under autocast, and where it is emulated."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from denoisers.precision import has_bf16_units, warn_of_emulated_bf16, with_precision


class Dense(nn.Module):
    """A layer that remembers the dtype of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(3, 3), []

    def forward(self, x: Tensor, timestep: Tensor, condition: None = None) -> Tensor:
        output = self.linear(x)
        self.seen.append(output.dtype)
        return output


@pytest.fixture
def capabilities(monkeypatch):
    """What the CPU says of itself."""

    def say(**named) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "cpu_name": "bf16", **named})
        has_bf16_units.cache_clear()

    yield say
    has_bf16_units.cache_clear()


def test_bf16_runs_the_network_in_bf16_and_returns_float32():
    x, dense = torch.randn(1, 2, 3, 3), Dense().requires_grad_(False)
    output = with_precision(dense, "bf16")(x, torch.tensor(1.0))
    assert dense.seen == [torch.bfloat16]
    assert output.dtype == torch.float32
    assert 0 < float((output - dense(x, torch.tensor(1.0))).abs().max()) < 0.05


def test_float32_is_the_denoiser_itself_and_others_are_refused():
    dense = Dense()
    assert with_precision(dense, "float32") is dense
    with pytest.raises(ValueError, match="unknown precision 'fp8': use one of float32, bf16"):
        with_precision(dense, "fp8")


@pytest.mark.parametrize("unit", ["amx_bf16", "avx512_bf16", "arm_bf16"])
def test_a_cpu_has_units_for_bf16_by_its_instructions(capabilities, unit):
    capabilities(**{unit: True})
    assert has_bf16_units("cpu")
    capabilities(**{unit: False})
    assert not has_bf16_units("cpu")


def test_emulated_bf16_is_told_where_it_is_asked_for(capabilities):
    capabilities()
    with pytest.warns(UserWarning, match="this cpu has no units for bf16 and emulates it: float32 is two to three"):
        with_precision(Dense(), "bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_precision(Dense(), "float32")
        with_precision(Dense().to("meta"), "bf16")
        capabilities(amx_bf16=True)
        with_precision(Dense(), "bf16")
        warn_of_emulated_bf16(torch.device("cpu"))
