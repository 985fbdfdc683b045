"""Adapters as files that other tools load."""
