"""Tests of openlora/adapters."""
