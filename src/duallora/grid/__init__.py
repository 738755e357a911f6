"""Grids of training runs: what they are (`study`), running them (`run`), and what came out (`summary`, `report`)."""
