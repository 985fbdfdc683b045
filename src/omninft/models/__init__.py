"""A joint audio-video policy over diffusers' LTX-2 family, its adapters, and the bundled tiny model."""
