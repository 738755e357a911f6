"""What lies on a disk: run folders, checkpoints, adapters, models, and what strangers put there."""
