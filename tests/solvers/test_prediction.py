"""Prediction types: every branch, against the definitions."""

import pytest
import torch

from solvers.prediction import (
    PREDICTION_TYPES,
    check_prediction_type,
    data_weights,
    noise_weights,
    per_sample,
    to_data,
    to_noise,
    to_output,
)

NODES = [(0.8, 0.6), (0.3, 0.7), (0.25, 3.0)]  # variance preserving, flow, neither


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize(
    ("prediction_type", "definition"),
    [
        ("epsilon", lambda data, noise, alpha, sigma: noise),
        ("sample", lambda data, noise, alpha, sigma: data),
        ("v_prediction", lambda data, noise, alpha, sigma: alpha * noise - sigma * data),
        ("flow_prediction", lambda data, noise, alpha, sigma: noise - data),
    ],
)
def test_output_and_back(prediction_type, definition, node):
    alpha, sigma = map(scalar, node)
    data, noise = torch.randn(2, 3, 5, dtype=torch.float64)
    state = alpha * data + sigma * noise
    output = to_output(prediction_type, data, noise, alpha, sigma)
    assert torch.allclose(output, definition(data, noise, alpha, sigma))
    assert torch.allclose(to_data(prediction_type, state, output, alpha, sigma), data)
    assert torch.allclose(to_noise(prediction_type, state, output, alpha, sigma), noise)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_data_and_noise_rebuild_the_state(prediction_type):
    """alpha data + sigma noise = x for any output, not only a perfect one."""
    alpha, sigma = scalar(0.4), scalar(0.9)
    state, output = torch.randn(2, 4, dtype=torch.float64)
    data, noise = (f(prediction_type, state, output, alpha, sigma) for f in (to_data, to_noise))
    assert torch.allclose(alpha * data + sigma * noise, state)


def test_by_hand():
    state, output, alpha, sigma = scalar(2.0), scalar(1.0), scalar(0.6), scalar(0.8)
    assert float(to_data("epsilon", state, output, alpha, sigma)) == pytest.approx((2 - 0.8) / 0.6)
    assert float(to_data("v_prediction", state, output, alpha, sigma)) == pytest.approx(0.6 * 2 - 0.8)
    assert float(to_noise("v_prediction", state, output, alpha, sigma)) == pytest.approx(0.8 * 2 + 0.6)
    flow = (scalar(0.25), scalar(0.75))
    assert float(to_data("flow_prediction", state, output, *flow)) == pytest.approx(2 - 0.75)
    assert float(to_noise("flow_prediction", state, output, *flow)) == pytest.approx(2 + 0.25)


def test_nodes_per_sample():
    alpha, sigma = torch.tensor([0.8, 0.3]).double(), torch.tensor([0.6, 0.7]).double()
    state, output = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    both = to_data("epsilon", state, output, alpha, sigma)
    for k in range(2):
        assert torch.allclose(both[k], to_data("epsilon", state[k], output[k], alpha[k], sigma[k]))
    assert per_sample(alpha, state).shape == (2, 1, 1)


def test_where_a_type_says_nothing():
    zero, one = scalar(0.0), scalar(1.0)
    with pytest.raises(ValueError, match="epsilon output at alpha = 0 does not determine the data"):
        data_weights("epsilon", zero, one)
    with pytest.raises(ValueError, match="sample output at sigma = 0 does not determine the noise"):
        noise_weights("sample", one, zero)
    assert [float(w) for w in data_weights("v_prediction", zero, one)] == [0.0, -1.0]
    assert [float(w) for w in data_weights("flow_prediction", zero, one)] == [1.0, -1.0]


def test_unknown_types():
    with pytest.raises(ValueError, match="unknown prediction type 'score': use one of epsilon, sample"):
        check_prediction_type("score")
    with pytest.raises(ValueError, match="unknown prediction type"):
        to_output("eps", scalar(1.0), scalar(1.0), scalar(1.0), scalar(1.0))
