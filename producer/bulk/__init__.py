"""Batches: a file of lines becomes bundles on the batch topic, answers become a file again."""
