"""The parts of `python -m mtl.report`: runs are read, grouped, compared and reported."""
