"""Tests of the adapter registry."""
