"""The recipe of a run: its settings, where they come from, and its YAML."""
