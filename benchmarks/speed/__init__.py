"""Time, memory and numbers of the engine."""
