"""Builds objects from a checked config, and explains what can't be built."""
