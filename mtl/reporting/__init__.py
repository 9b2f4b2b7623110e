"""The modules of `python -m mtl.report`, which read, group and compare runs, and write the report."""
