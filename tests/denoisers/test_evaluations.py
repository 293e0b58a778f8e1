"""The count of network evaluations that all methods share."""

from denoisers import Evaluations, with_guidance
from solvers import NoiseSchedule
from tests.solver_search.toys import Labelled


def test_calls_weigh_the_kinds():
    spent = Evaluations(forward=100, backward=10, tangent=1)
    assert spent.record() == {"forward": 100, "backward": 10, "tangent": 1, "calls": 121}


def test_a_guided_evaluation_is_two_calls():
    network = Labelled(NoiseSchedule.linear())
    for scale, calls in ((1.0, 3), (2.0, 6)):
        spent = Evaluations.of(with_guidance(network, scale))
        spent.forward += 3
        assert spent.calls == calls


def test_processes_add_up():
    spent = Evaluations(forward=3, backward=2, tangent=1, calls_each=2).summed(lambda value: 2 * value)
    assert spent == Evaluations(forward=6, backward=4, tangent=2, calls_each=2)
