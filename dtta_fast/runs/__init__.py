"""Runs over data sets: what is run, the folder that it is recorded in, and what its records add up to."""
