"""What `rd-torch learn` finds on the data at hand."""
