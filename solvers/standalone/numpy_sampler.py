"""One learned diffusion solver in one file. Needs NumPy only; TABLE holds every number.

    state[0]   = start_scale * noise
    output[i]  = model(state[i], timesteps[i])
    state[i+1] = sum_j state_coef[i,j] state[j] + output_coef[i,j] output[j] + noise_coef[i,j] step_noise[j],   j <= i

States are alpha * data + sigma * noise at the nodes alpha[i], sigma[i]; state[N] is the image. What the model must
return is TABLE["prediction_type"] (`epsilon`, `sample`, `v_prediction`, or `flow_prediction` = noise - data), with
classifier-free guidance, if any, already inside, at the scale TABLE["guidance_scale"].
"""

import numpy as np

TABLE: dict = {}


def sample(model, noise, step_noise=None):
    """Run the solver.

    Args:
        model: `model(x, timestep) -> output`; x (batch, *shape), timestep a float, may be fractional.
        noise: (batch, *shape), unit Gaussian.
        step_noise: fresh unit noises (N, batch, *shape), for a solver with noise_coef.
    Returns:
        The image, (batch, *shape), in the dtype of `noise`; states accumulate in float32 or better.
    Raises:
        ValueError: a solver with noise_coef without `step_noise`, or one of a wrong shape.
    """
    noise = np.asarray(noise)
    steps, wide = len(TABLE["timesteps"]), np.promote_types(noise.dtype, np.float32)
    state_coef, output_coef, noise_coef = (np.array(TABLE[k]) for k in ("state_coef", "output_coef", "noise_coef"))
    fresh = np.zeros((0,)) if step_noise is None else np.asarray(step_noise, wide)
    if noise_coef.any() and fresh.shape != (steps, *noise.shape):
        raise ValueError(f"this solver adds fresh noise: pass step_noise of shape {(steps, *noise.shape)}")
    states, outputs = [(noise * TABLE["start_scale"]).astype(wide)], []
    for i, timestep in enumerate(TABLE["timesteps"]):
        outputs.append(np.asarray(model(states[i], timestep)).astype(wide))
        state = np.zeros_like(states[0])
        for j in range(i + 1):
            state += wide.type(state_coef[i, j]) * states[j] + wide.type(output_coef[i, j]) * outputs[j]
            if noise_coef[i, j]:
                state += wide.type(noise_coef[i, j]) * fresh[j]
        states.append(state)
    return states[-1].astype(noise.dtype)
