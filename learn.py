"""From a model to solvers of few network calls: `python learn.py MODEL --calls 4 6 8 10`, see learn/README.md."""

from learn.cli import main

if __name__ == "__main__":
    main()
