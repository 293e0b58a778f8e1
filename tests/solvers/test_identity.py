"""The identity of a denoiser: what is read, stated and compared."""

import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from solvers import DenoiserIdentity, NoiseSchedule, SolverError, identify
from solvers.identity import guidance_fits, weight_hash

LINEAR = NoiseSchedule.linear()
FULL = DenoiserIdentity(LINEAR, 2.0, {"ratio": 0.9}, "tiny", "abc")


class Network(nn.Linear):
    schedule, guidance_scale, thresholding = LINEAR, 1.5, {"range": (-1, 1)}

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.name = "linear"


def test_what_a_denoiser_says_of_itself():
    network = Network()
    assert identify(network) == DenoiserIdentity(LINEAR, 1.5, {"range": [-1, 1]}, "linear", weight_hash(network))
    network.weight_hash = "known"
    assert identify(network).weight_hash == "known"

    def function(x, timestep, condition):
        return x

    function.schedule = LINEAR
    assert identify(function) == DenoiserIdentity(LINEAR)


def test_stated_fields_are_not_asked_for():
    class Costly:
        @property
        def weight_hash(self):
            raise AssertionError("hashed all the same")

    stated = {"schedule": LINEAR, "guidance_scale": [1, 4], "weight_hash": "abc"}
    assert identify(Costly(), **stated) == DenoiserIdentity(LINEAR, (1.0, 4.0), weight_hash="abc")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": NoiseSchedule.scaled_linear()}, "made for noise schedule .*'linear'.*, found .*'scaled_linear'"),
        (
            {"schedule": NoiseSchedule.linear(prediction_type="sample")},
            "made for prediction type epsilon, found sample",
        ),
        ({"guidance_scale": 3.0}, "made for guidance scale 2.0, found 3.0"),
        ({"guidance_scale": (2.5, 3.0)}, "made for guidance scale 2.0, found"),
        ({"thresholding": None}, "made for thresholding {'ratio': 0.9}, found None"),
        ({"weight_hash": "f" * 64}, "made for weights abc, found f{12}$"),
    ],
)
def test_each_field_has_its_message(change, message):
    (found,) = FULL.differences(replace(FULL, **change))
    assert re.search(message, found)


def test_what_fits():
    assert FULL.differences(FULL) == []
    assert FULL.differences(DenoiserIdentity(LINEAR, (1, 2), {"ratio": 0.9}, "another", None)) == []
    assert DenoiserIdentity(LINEAR).differences(DenoiserIdentity(LINEAR, weight_hash="abc")) == []


@pytest.mark.parametrize(
    ("one", "other", "fits"),
    [
        (2, 2.0, True),
        (2, 2 + 1e-12, True),
        (2, 2.1, False),
        ([1, 4], 4, True),
        (4.5, [1, 4], False),
        ([1, 4], [2, 3], True),
    ],
)
def test_guidance_fits(one, other, fits):
    assert guidance_fits(one, other) is guidance_fits(other, one) is fits


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), (4.0, 1.0), (1.0,), (1.0, 2.0, 3.0)])
def test_a_guidance_scale_is_a_number_or_a_range(scale):
    with pytest.raises(SolverError, match=r"give one number or \[lowest, highest\]"):
        DenoiserIdentity(LINEAR, scale)


def test_what_cannot_be_an_identity():
    with pytest.raises(SolverError, match="the denoiser has no `schedule`"):
        identify(nn.Identity())
    with pytest.raises(SolverError, match="value JSON cannot keep"):
        DenoiserIdentity(LINEAR, thresholding={"ratio": torch.ones(1)})


def adapted(**active: float) -> nn.Module:
    """Two layers, of which the first has a LoRA named `one` and one named `other`."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for name in active:
        config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
        inject_adapter_in_model(config, network, name)
    layer = network[0]
    layer.set_adapter(list(active))
    for name, scale in active.items():
        layer.set_scale(name, scale)
    return network


def test_a_compiled_network_has_the_hash_of_its_weights():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    plain = weight_hash(network)
    network[1] = torch.compile(network[1])
    assert weight_hash(network) == weight_hash(torch.compile(network)) == plain


@pytest.mark.parametrize("active", [{"one": 1.0}, {"one": 0.5, "other": 2.0}])
def test_a_lora_has_the_hash_of_the_weights_it_is_fused_into(active):
    network = adapted(**active)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    unfused = weight_hash(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network[0].merge()
    assert weight_hash(network) == unfused
    plain = nn.Sequential(network[0].base_layer, network[1])
    assert weight_hash(plain) == unfused
    assert weight_hash(adapted(**active | {"one": 0.25})) != unfused


def test_adapters_that_are_switched_off_do_not_count():
    network = adapted(one=1.0)
    fused, plain = weight_hash(network), nn.Sequential(network[0].base_layer, network[1])
    network[0].enable_adapters(False)
    assert weight_hash(network) == weight_hash(plain) != fused
