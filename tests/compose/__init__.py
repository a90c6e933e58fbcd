"""Tests of compose.yml and the Dockerfiles."""
