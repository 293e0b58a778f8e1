"""Learning rates over the steps of a run."""

import math


def warmup_stable_decay(step: int, total: float, warmup_steps: int, decay_fraction: float) -> float:
    """Rate at a step over the peak: linear warm-up, stable, then linearly to zero at the last step.

    Args:
        step: from 0.
        total: steps of the run; infinite for none known, and then the rate stays.
        warmup_steps: steps of warm-up.
        decay_fraction: the last part of the steps after the warm-up over which the rate falls, in [0, 1].
    """
    if step < warmup_steps or not math.isfinite(total):
        return min(1.0, (step + 1) / max(1, warmup_steps))
    decay = max(1.0, decay_fraction * (total - warmup_steps))
    return min(1.0, max(0.0, (total - step) / decay))
