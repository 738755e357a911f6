"""Grids of training runs: what they are (`study`), and how they are worked off (`run`)."""
