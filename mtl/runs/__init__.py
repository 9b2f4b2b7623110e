"""Run folders: loads, resumes, compares and summarises runs."""
