"""What a search finds on the data at hand: how much of it, and how right it is."""
