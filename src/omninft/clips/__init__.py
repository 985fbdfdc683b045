"""Latents to clips, and clips to and from files with sound."""
