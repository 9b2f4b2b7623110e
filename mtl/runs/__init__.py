"""Run folders: loading, resuming, comparing and summarising runs."""
