"""What leaves this package: a plain LoRA for other programs, a verdict on an adapter, its card, its upload."""
