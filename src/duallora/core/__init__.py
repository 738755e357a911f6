"""The method itself: the equation, its gradient, its initial values and its gate. Imports torch only."""
