"""Programs around diffusers that are no requirement of this project: tested where they are installed."""

import pytest
import torch

from solvers import TableScheduler, tabulate
from tests.tiny_pipelines import call_arguments, tiny_pipeline


def test_cache_dit_leaves_the_scheduler_alone():
    cache_dit = pytest.importorskip("cache_dit")
    pipe, arguments = tiny_pipeline("flux"), call_arguments("flux", ["a cat"], 3.0, 6)
    own = pipe.scheduler

    def run(scheduler):
        pipe.scheduler = scheduler
        return pipe(**arguments, generator=torch.Generator().manual_seed(0)).images

    whole = run(own)
    mu = 0.5 + (16 - 256) * (1.15 - 0.5) / (4096 - 256)  # of 16 tokens, as the pipeline has it
    table = tabulate(own, None, set_timesteps={"sigmas": [1 - row / 6 for row in range(6)], "mu": mu})
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=5.0
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    cached = run(own)
    assert not torch.allclose(cached, whole, atol=1e-3)
    assert torch.allclose(run(TableScheduler.from_solver(table)), cached, atol=1e-5)
