"""Tests of openlora/models."""
