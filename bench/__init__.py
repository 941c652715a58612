"""Benchmarks: every number is reported beside a parity check that passed. `python -m bench --help`."""
