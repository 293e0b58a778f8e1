"""What a run says of itself, for people who look for it among others."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.manifest import MANIFEST_NAME
from solvers import DenoiserIdentity
from solvers.files import sha256

SPENT = "network_calls"  # name of the axis that errors are drawn over: calls that were spent on a solver
ABOUT = "run"  # where a run's W&B config holds what is no option of `train.py`


@dataclass(frozen=True)
class RunCard:
    """A run by its method, its model and what it makes.

    Args:
        method: such as `olss` or `base`.
        model: name of the network that solvers are made for, or of the one that is trained.
        artifacts: what it makes, such as `olss-4`.
    """

    method: str
    model: str
    artifacts: Sequence[str] = ()

    @property
    def name(self) -> str:
        """`digits-dit olss-4 olss-6`."""
        return " ".join([self.model, *(self.artifacts or [self.method])])

    @property
    def tags(self) -> list[str]:
        """Model, method and artifacts."""
        return [self.model, self.method, *self.artifacts]


def about_model(identity: DenoiserIdentity, teacher: str | None) -> dict[str, Any]:
    """What a run's config says of its model, and of the solver that it learns from."""
    return {
        "model": identity.name,
        "weight_hash": identity.weight_hash,
        "guidance_scale": identity.guidance_scale,
        "teacher": teacher,
    }


@dataclass(frozen=True)
class Origin:
    """Something that a run learned from, known by its content.

    Args:
        name: among those of its kind.
        kind: `model` or `trajectories`.
        digest: of its content.
        where: it was found, for people.
    """

    name: str
    kind: str
    digest: str
    where: str | Path | None = field(default=None, compare=False)

    @classmethod
    def of_model(cls, identity: DenoiserIdentity, where: str | Path | None = None) -> "Origin":
        """A network, by the hash of its weights."""
        return cls(identity.name or "model", "model", identity.weight_hash or "unknown", where)

    @classmethod
    def of_trajectories(cls, folder: Path) -> "Origin":
        """A cache, by its manifest, which holds the checksum of every shard."""
        return cls(f"trajectories-{folder.resolve().name}", "trajectories", sha256(folder / MANIFEST_NAME), folder)

    def record(self) -> dict[str, Any]:
        """For a run's config, and for the artifacts that came from it."""
        return {"name": self.name, "digest": self.digest, "where": None if self.where is None else str(self.where)}
