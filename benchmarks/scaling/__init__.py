"""What nesting buys and costs at every level of a family."""
