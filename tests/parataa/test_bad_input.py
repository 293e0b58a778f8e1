from dataclasses import replace

import pytest
import torch

from parataa import ParallelSettings, parallel_sample
from solvers import NoiseSchedule, start_noise
from tests.parataa.problems import SHAPE, euler_table, mixing_denoiser

VP = NoiseSchedule.linear()
TABLE, NOISE = euler_table(VP, 6), start_noise(range(2), SHAPE)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"order": 0}, "order is 0: it must be a whole number, at least 1$"),
        ({"window": 0}, "window is 0: it must be a whole number, at least 1$"),
        ({"window": 2.5}, "window is 2.5: it must be a whole number"),
        ({"memory": 0}, r"memory is 0: it must be a whole number, at least 1 \(1 is plain iteration\)"),
        ({"memory": None}, "memory is None: it must be a whole number"),
        ({"max_rounds": 0}, "max_rounds is 0: it must be a whole number, at least 1"),
        ({"batch_size": 0}, "batch_size is 0: it must be a whole number, at least 1"),
        ({"tolerance": 0.0}, "tolerance is 0.0: it must be finite and positive"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"tolerance": "1e-3"}, "tolerance is 1e-3: it must be finite and positive"),
        ({"tolerance": None}, "tolerance is None"),
        ({"regularization": 0.0}, "regularization is 0.0"),
        ({"data_std": -0.5}, "data_std is -0.5"),
        ({"data_std": float("inf")}, "data_std is inf"),
        ({"safeguard": 0.0}, "safeguard is 0.0: it must be positive; infinity switches it off"),
        ({"safeguard": float("nan")}, "safeguard is nan"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        ParallelSettings(**setting)
    with pytest.raises(ValueError, match=message):
        parallel_sample(mixing_denoiser(VP), TABLE, NOISE, **setting)


@pytest.mark.parametrize("name", ["order", "window"])
def test_settings_beyond_the_table(name):
    with pytest.raises(ValueError, match=f"{name} is 7: a table of 6 rows allows 1 to 6"):
        parallel_sample(mixing_denoiser(VP), TABLE, NOISE, settings=ParallelSettings(**{name: 7}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"warm_start": torch.zeros(6, 2, *SHAPE)},
            r"warm_start has shape .*: needed are all states, \(7, 2, 2, 3, 3\)",
        ),
        ({"condition": torch.zeros(3)}, "the condition has 3 samples and the noise 2"),
    ],
)
def test_inputs_that_do_not_fit_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        parallel_sample(mixing_denoiser(VP), TABLE, NOISE, **options)


def test_an_unknown_setting():
    with pytest.raises(TypeError, match="unexpected keyword argument 'tolerence'"):
        parallel_sample(mixing_denoiser(VP), TABLE, NOISE, tolerence=1e-3)


@pytest.mark.parametrize("noise", [torch.zeros(4), torch.zeros(0, *SHAPE), torch.zeros(2, *SHAPE, dtype=torch.int64)])
def test_noise_must_be_a_floating_batch(noise):
    with pytest.raises(ValueError, match=r"needed is floating \(batch, \*shape\)"):
        parallel_sample(mixing_denoiser(VP), TABLE, noise)


def test_a_table_with_unused_evaluations():
    output_coef = TABLE.output_coef.clone()
    output_coef[2] = 0
    table = replace(TABLE, output_coef=output_coef, output_support=None)
    with pytest.raises(ValueError, match=r"outputs of calls \[2\] never reach the final state.*sequential sampler"):
        parallel_sample(mixing_denoiser(VP), table, NOISE)


def test_a_stochastic_table_needs_noises():
    with pytest.raises(ValueError, match="pass seeds"):
        parallel_sample(mixing_denoiser(VP), euler_table(VP, 6, noisy=0.5), NOISE)


def test_a_denoiser_that_returns_nan_in_one_row():
    inner = mixing_denoiser(VP)

    def broken(x, timestep, condition):
        output = inner(x, timestep, condition)
        output[9, 0, 0, 0] = float("nan")
        return output

    message = r"not finite in 1 of 12 calls, first for sample 1 at row 3, timestep 499.5"
    with pytest.raises(ValueError, match=message):
        parallel_sample(broken, TABLE, NOISE)


def test_a_denoiser_that_returns_another_shape():
    with pytest.raises(ValueError, match=r"returned shape .* for states"):
        parallel_sample(lambda x, timestep, condition: x[:, :1], TABLE, NOISE)
