"""The figures of docs/table.md."""

import doctest
from pathlib import Path

import diffusers
import pytest

from solvers import NoiseSchedule, named_solver, tabulate

PAGE = Path(__file__).parents[2] / "docs" / "table.md"


def test_examples_of_the_page_print_what_it_says():
    text = PAGE.read_text(encoding="utf-8").replace("```", "")
    examples = doctest.DocTestParser().get_doctest(text, {}, "table.md", str(PAGE), 0)
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(examples)
    assert results.attempted >= 6
    assert results.failed == 0


def test_figures_in_the_text():
    assert named_solver("ddim:2", NoiseSchedule.linear()).noise_amplification() == pytest.approx(154, abs=0.1)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="linspace")
    assert float(tabulate(scheduler, 6).sigma[-1]) == pytest.approx(0.29, abs=0.005)
