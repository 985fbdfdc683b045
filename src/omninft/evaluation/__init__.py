"""Paired evaluation: the same prompts and the same noise, before and after."""
