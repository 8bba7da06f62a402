"""Runs over data sets: their configuration, the folder that records them, and the summary of their records."""
