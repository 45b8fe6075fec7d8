"""A run on the Hub: its card, its repository, and its demo as a Space."""
