"""The commands, by what they are for; `omninft.cli` puts them together."""
