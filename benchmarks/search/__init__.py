"""How search by nested embeddings does."""
