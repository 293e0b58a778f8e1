"""Settings every test shares: no network, no accounts, few threads."""

import os

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true")

import pytest
import torch

torch.set_num_threads(1)  # a fork after a parallel loop would wait for threads that it does not have


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _runs_elsewhere(monkeypatch, tmp_path):
    """A folder `wandb` in the repository would pass for a package of it."""
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))


@pytest.fixture
def device():
    """A GPU, or with TEST_DEVICE=cpu the CPU, so that the tests of a GPU can be rehearsed without one."""
    name = os.environ.get("TEST_DEVICE", "cuda")
    if name != "cpu" and not torch.cuda.is_available():
        pytest.skip("needs a GPU; TEST_DEVICE=cpu rehearses it")
    return torch.device(name)
