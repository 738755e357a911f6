"""Benchmarks: what Dual LoRA costs beside its arithmetic floor and beside PEFT's methods.

    layer    one linear layer, forward + backward            step    a training step of a whole model, and its memory
    kernel   the two passes over W of each backend

Competitors run interleaved in one process, so that whatever slows the machine slows all of them; what is reported is
ratios of medians, with quartiles. Each finished cell is written at once, and a run that is started again skips the
cells it finds (`duallora.bench.store`). benchmarks/report.py turns the JSON into the tables of the docs.
"""
