"""Tests of openlora.kernels."""
