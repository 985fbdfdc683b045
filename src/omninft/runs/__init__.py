"""A run: its parts from the config, its folder, its session, and what is checked before it."""
