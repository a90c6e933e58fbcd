"""Tests of openlora.engine."""
