"""Synthetic guests and engines with faults, for tests, benches and users; not for production."""
