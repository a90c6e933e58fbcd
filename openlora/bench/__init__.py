"""Benchmarks a user can run: ``openlora bench …`` or ``python -m openlora.bench …``."""
