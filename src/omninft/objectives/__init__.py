"""Losses that turn advantages into gradients."""
