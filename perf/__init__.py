"""Measurements of uringmig beside what a user would pick instead: ``python -m perf --help``."""
