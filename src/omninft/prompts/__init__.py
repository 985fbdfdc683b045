"""Prompt sets and the groups an iteration samples."""
