"""Train anything in this repository: `python train.py fit --config configs/<method>/<experiment>.yaml`."""

from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Run fit, validate, test or predict with a config and overrides (`--help` lists them)."""
    from training.cli import run

    run(args)


if __name__ == "__main__":
    main()
