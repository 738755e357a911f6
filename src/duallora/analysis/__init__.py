"""What training did to adapters: signs, ranks, how far weights turned and stretched."""
