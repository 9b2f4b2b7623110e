"""Computations that several balancers share."""
