"""Rebuilding the bundled model from its world: autoencoders, vocoder, text side, transformer."""
