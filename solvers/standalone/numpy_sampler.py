"""One learned diffusion solver in one file. Needs NumPy only; TABLE holds every number.

    state[0]   = start_scale * noise
    output[k]  = model(state[row of k], timesteps[row of k], branch of k)
    state[i+1] = sum_j state_coef[i,j] state[j] + sum_k output_coef[i,k] output[k]
                 + sum_j noise_coef[i,j] step_noise[j],   j <= i, row of k <= i

States are alpha * data + sigma * noise at the nodes alpha[i], sigma[i]; state[N] is the image. What the model must
return is TABLE["prediction_type"] (`epsilon`, `sample`, `v_prediction`, or `flow_prediction` = noise - data). Without
TABLE["calls"] it is called once a row, with classifier-free guidance, if any, already inside, at the scale
TABLE["guidance_scale"]. With them guidance is in the weights: the model is told the branch, "conditional" or
"unconditional". With TABLE["space"] a weight is one channel matrix per band of spatial frequencies.
"""

import numpy as np

TABLE: dict = {}


def sample(model, noise, step_noise=None):
    """Run the solver.

    Args:
        model: `model(x, timestep) -> output`, or `model(x, timestep, branch)` for a solver with calls; x
            (batch, *shape), timestep a float, may be fractional.
        noise: (batch, *shape), unit Gaussian.
        step_noise: fresh unit noises (N, batch, *shape), for a solver with noise_coef.
    Returns:
        The image, (batch, *shape), in the dtype of `noise`; states accumulate in float32 or better.
    Raises:
        ValueError: a solver with noise_coef without `step_noise`, or one of a wrong shape.
    """
    noise = np.asarray(noise)
    steps, wide = len(TABLE["timesteps"]), np.promote_types(noise.dtype, np.float32)
    blocks = [np.array(TABLE[name]) for name in ("state_coef", "output_coef", "noise_coef")]
    fresh = np.zeros((0,)) if step_noise is None else np.asarray(step_noise, wide)
    if blocks[2].any() and fresh.shape != (steps, *noise.shape):
        raise ValueError(f"this solver adds fresh noise: pass step_noise of shape {(steps, *noise.shape)}")
    calls = (
        [(row, (branch,)) for row, branch in TABLE["calls"]] if "calls" in TABLE else [(i, ()) for i in range(steps)]
    )
    states, outputs = [(noise * TABLE["start_scale"]).astype(wide)], []
    for i, timestep in enumerate(TABLE["timesteps"]):
        made = [branch for row, branch in calls if row == i]
        outputs += [np.asarray(model(states[i], timestep, *branch)).astype(wide) for branch in made]
        state = np.zeros_like(states[0])
        for coef, values in zip(blocks, (states, outputs, fresh)):
            for weight, value in zip(coef[i], values):
                if weight.any():
                    state += _weighted(weight, value).astype(wide)
        states.append(state)
    return states[-1].astype(noise.dtype)


def _weighted(weight, value):
    """weight * value; with bands, channel matrices on the spatial frequencies of each."""
    if weight.ndim == 0:
        return value.dtype.type(weight) * value
    if not TABLE["space"]["edges"]:
        return np.einsum("ab,nb...->na...", weight[0], value)
    vertical, horizontal = (np.fft.fftfreq(size) for size in value.shape[-2:])
    band = np.digitize(np.sqrt(vertical[:, None] ** 2 + horizontal**2), TABLE["space"]["edges"])
    mixed = np.einsum("hwab,nb...hw->na...hw", weight[band], np.fft.fft2(value))
    return np.fft.ifft2(mixed).real
