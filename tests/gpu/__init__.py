"""Tests that need a CUDA GPU: run with ``-m gpu``."""
