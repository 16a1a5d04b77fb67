"""Embedding files; one file a format."""
