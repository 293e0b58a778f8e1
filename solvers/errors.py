"""Errors of solver artifacts."""


class SolverError(ValueError):
    """A solver artifact that cannot be used: says what is wrong, what was found, what is allowed and what to do."""
