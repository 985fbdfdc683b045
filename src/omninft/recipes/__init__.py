"""Shipped recipes: instances of the config tree."""
