"""How much memory training takes per GPU, before renting one: `planner` adds up what `trace` counts without weights."""
