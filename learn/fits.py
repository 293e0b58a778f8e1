"""Methods run here, without a trainer: what they find for one number of calls, kept as an artifact."""

import shutil
from pathlib import Path
from typing import Any

from data.teacher_data import TeacherData
from data.trajectories import TrajectoryCache
from learn.cost import REFINED, ROUNDS, SEARCHED, STEPS
from learn.options import LearnOptions
from learn.subject import Subject
from olss.method import OLSS
from solver_search.descent import Descent
from solver_search.method import SolverSearch
from solver_search.objective import Compute
from solver_search.starts import Start
from solvers import SolverTable, identify, load_solver, save_solver
from training.clock import Clock
from training.method import Method, Result, Run


class Here(Run):
    """A run in this process whose results are artifacts.

    Args:
        subject: the model.
        data: opened for the method.
        folder: of the artifacts.
        method: what stands in them.
    """

    def __init__(self, subject: Subject, data: TeacherData, folder: Path, method: str) -> None:
        super().__init__(subject.denoiser, data)
        self.folder, self.method = folder, method
        self.device, self.shows_progress = subject.device, True
        self.clock = Clock()

    def save(self, result: Result, is_final: bool = True) -> Path | None:
        """The last version of a table, with what it took."""
        if not is_final:
            return None
        spent = {"evaluations": result.spent.record(), "seconds": self.clock.seconds}
        return save_solver(
            result.table.detach(),
            self.folder / f"{result.name}.json",
            identify(self.denoiser),
            method=self.method,
            fitted_on=result.fitted_on | spent,
            validation=result.validation,
            config=result.config,
        )


def learned(subject: Subject, cache: TrajectoryCache, options: LearnOptions, calls: int, folder: Path) -> SolverTable:
    """The best solver of so many calls by least squares; the one of an earlier run where there is one."""
    path = folder / f"olss-{calls}.json"
    if not path.exists():
        method = OLSS(
            calls=calls,
            path="search",
            weights="auto",
            search_trajectories=min(options.trajectories, SEARCHED),
            search_rounds=ROUNDS,
        )
        data = _data(cache, options).open(subject.denoiser, method.wanted)
        _run(method, Here(subject, data, folder, method.name))
        shutil.rmtree(folder / "solver-outputs", ignore_errors=True)
    return load_solver(path, subject.denoiser)


def refined(
    subject: Subject, cache: TrajectoryCache, options: LearnOptions, start: SolverTable, folder: Path
) -> SolverTable:
    """A solver moved by derivatives, judged on the half of the held-out trajectories that chooses."""
    calls = start.nfe
    path = folder / f"solver-search-{calls}.json"
    if not path.exists():
        method = SolverSearch(
            nfe=calls,
            start=Start(start.info["path"]),
            descent=Descent(steps=STEPS),
            compute=Compute(micro_batch=options.batch_size),
        )
        data = _data(cache, options, REFINED).open(subject.denoiser, method.wanted)
        before = subject.network.calls
        _run(method, Here(subject, data, folder, method.name))
        spent = load_solver(path).info["fitted_on"]["evaluations"]["calls"]
        subject.network.calls = before + spent  # a batch of derivatives passes the network as one call
    return load_solver(path, subject.denoiser)


def _data(cache: TrajectoryCache, options: LearnOptions, limit: int | None = None) -> TeacherData:
    count = options.trajectories
    limit = None if limit is None else min(limit, count)
    return TeacherData(str(cache.folder), limit=limit, holdout=count, batch_size=min(count, options.batch_size))


def _run(method: Method, run: Run) -> Any:
    """All epochs."""
    fitting = method.begin(run)
    fitting.start()
    loader = run.data.train_dataloader()
    while not fitting.done:
        for batch in loader:
            if not fitting.done:
                fitting.step(batch)
        fitting.end_epoch()
    fitting.finish()
    return fitting
