"""How far a long campaign is: said every minute, and kept in a file from which it goes on."""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from learn.cost import duration
from solvers.provenance import provenance

EVERY = 60.0  # seconds


@dataclass
class Journal:
    """The broken rules of every trial, each a line of JSON; those of other commits do not count.

    Args:
        path: the file; None: nothing is kept.
    """

    path: Path | None = None
    _commit: str = field(default_factory=lambda: str(provenance()["git_commit"]), init=False)

    def counts(self, part: str, trials: Mapping[str, Callable[[], Sequence[str]]]) -> Counter:
        """Broken rules of the trials of a part; each trial is made once.

        Args:
            part: its name.
            trials: by their names; each returns its broken rules.
        """
        known = self._known(part)
        counts = Counter(rule for name in trials for rule in known.get(name, ()))
        todo = [name for name in trials if name not in known]
        begin = told = time.monotonic()
        for done, name in enumerate(todo, 1):
            rules = list(trials[name]())
            counts.update(rules)
            self._keep({"commit": self._commit, "part": part, "trial": name, "rules": rules})
            now, left = time.monotonic(), len(todo) - done
            if now - told >= EVERY or not left:
                told, rest = now, (now - begin) / done * left
                found = ", ".join(f"{rule} {count}" for rule, count in counts.items()) or "nothing broken"
                place = f"{len(trials) - left:,} of {len(trials):,}, {duration(rest)} left"
                print(f"{part}: {place}; {found}", file=sys.stderr, flush=True)
        return counts

    def _known(self, part: str) -> dict[str, list[str]]:
        found = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path and self.path.exists() else ():
            with suppress(ValueError):  # the last line, of a campaign that was killed
                values = json.loads(line)
                if values["commit"] == self._commit and values["part"] == part:
                    found[values["trial"]] = values["rules"]
        return found

    def _keep(self, values: dict) -> None:
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(values))  # also after a line that a kill has cut
