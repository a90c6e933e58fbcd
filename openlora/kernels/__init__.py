"""Torch operators of one decoder step: the CPU path, and the reference of every GPU kernel."""
