"""What `python -m mtl.report` is made of: runs are read, grouped, compared, and written down."""
