"""Options of Lightning's trainer: those that cannot work are refused, the others do what they say."""

from types import SimpleNamespace

import lightning
import pytest
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging

from data.images import ImageData
from denoisers import load_denoiser
from tests.training.test_resume import base, fit, slam
from training.levers import BatchSizes, check_levers
from training.sharded import Sharded

METHOD, NETWORK = SimpleNamespace(automatic_optimization=False), SimpleNamespace(automatic_optimization=True)


def trainer(**options):
    return lightning.Trainer(**{"accelerator": "cpu", "logger": False, "enable_checkpointing": False} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16-true"}, r"precision bf16-true rounds the network.*: use one of 32-true, bf16-mixed"),
        ({"precision": "64-true"}, "precision 64-true"),
        ({"accumulate_grad_batches": 2}, r"accumulate_grad_batches does nothing .* data\.batch_size"),
        ({"gradient_clip_val": 1.0}, "gradient_clip_val does nothing"),
        ({"callbacks": [BatchSizeFinder()]}, r"BatchSizeFinder .* data\.batch_size"),
        ({"callbacks": [StochasticWeightAveraging(0.1)]}, "StochasticWeightAveraging has no weights"),
    ],
)
def test_what_a_method_cannot_follow_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_levers(trainer(**options), METHOD, is_resumed=False)
    check_levers(trainer(**options), NETWORK, is_resumed=False)
    check_levers(trainer(precision="bf16-mixed"), METHOD, is_resumed=True)


def test_what_a_network_cannot_follow_is_refused():
    with pytest.raises(ValueError, match=r"LearningRateFinder .* --model\.optimizer\.learning_rate"):
        check_levers(trainer(callbacks=[LearningRateFinder()]), NETWORK, is_resumed=False)
    with pytest.raises(ValueError, match="BatchSizeFinder would change the batches of the checkpoint"):
        check_levers(trainer(callbacks=[BatchSizeFinder()]), NETWORK, is_resumed=True)


def test_what_cannot_be_sharded_is_refused(tmp_path):
    sharded = trainer(strategy=Sharded(), devices=2)
    with pytest.raises(ValueError, match="BaseModel shards no network"):
        check_levers(sharded, base(tmp_path), is_resumed=False)
    check_levers(sharded, slam(tmp_path), is_resumed=False)


@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_the_search_of_a_batch_size_settles_and_writes_nothing(tmp_path, mode):
    """At the largest power that the 1,618 samples fill; what is written is of the training alone."""
    data, module = ImageData("digits"), base(tmp_path / "out")
    finder = BatchSizeFinder(mode, init_val=400, steps_per_trial=1, margin=0.0)
    seen, finish = [], module.finish
    module.finish = lambda: (seen.append(module.global_step), finish())
    fit(module, data, callbacks=[finder, BatchSizes()], max_steps=2, default_root_dir=tmp_path, limit_val_batches=0)
    assert (data.batch_size, finder.optimal_batch_size, seen) == (1600, 1600, [2])
    assert load_denoiser(tmp_path / "out").sample_shape == (1, 8, 8)
