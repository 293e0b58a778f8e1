from dataclasses import replace

import pytest
import torch

from parataa import parallel_sample
from solvers import NoiseSchedule, start_noise
from tests.parataa.problems import SHAPE, euler_table, mixing_denoiser

VP = NoiseSchedule.linear()
TABLE, NOISE = euler_table(VP, 6), start_noise(range(2), SHAPE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 0}, "order is 0: a table of 6 rows allows 1 to 6"),
        ({"order": 7}, "order is 7"),
        ({"window": 0}, "window is 0: a table of 6 rows allows 1 to 6"),
        ({"window": 7}, "window is 7"),
        ({"memory": 0}, r"memory is 0: it must be at least 1 \(1 is plain iteration\)"),
        ({"max_rounds": 0}, "max_rounds is 0: it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"tolerance": 0.0}, "tolerance is 0.0: it must be finite and positive"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"regularization": 0.0}, "regularization is 0.0"),
        ({"noise_tolerance": -0.1}, "noise_tolerance is -0.1: it must be finite and not negative"),
        ({"data_std": -0.5}, "data_std is -0.5"),
        ({"safeguard": 0.0}, "safeguard is 0.0: it must be positive; infinity switches it off"),
        (
            {"warm_start": torch.zeros(6, 2, *SHAPE)},
            r"warm_start has shape .*: needed are all states, \(7, 2, 2, 3, 3\)",
        ),
        ({"condition": torch.zeros(3)}, "the condition has 3 samples and the noise 2"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        parallel_sample(mixing_denoiser(VP), TABLE, NOISE, **options)


@pytest.mark.parametrize("noise", [torch.zeros(4), torch.zeros(0, *SHAPE), torch.zeros(2, *SHAPE, dtype=torch.int64)])
def test_noise_must_be_a_floating_batch(noise):
    with pytest.raises(ValueError, match=r"needed is floating \(batch, \*shape\)"):
        parallel_sample(mixing_denoiser(VP), TABLE, noise)


def test_a_table_with_unused_evaluations():
    output_coef = TABLE.output_coef.clone()
    output_coef[2] = 0
    table = replace(TABLE, output_coef=output_coef, output_support=None)
    with pytest.raises(ValueError, match=r"outputs of rows \[2\] never reach the final state.*sequential sampler"):
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

    message = r"not finite for 1 of 12 rows, first for sample 1 at row 3, timestep 499.5"
    with pytest.raises(ValueError, match=message):
        parallel_sample(broken, TABLE, NOISE)


def test_a_denoiser_that_returns_another_shape():
    with pytest.raises(ValueError, match=r"returned shape .* for states"):
        parallel_sample(lambda x, timestep, condition: x[:, :1], TABLE, NOISE)
