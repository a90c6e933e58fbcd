"""Batches, from the file read to the file written."""
