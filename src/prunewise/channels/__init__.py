"""Which channels must stay, under a budget."""
