"""What scores of variants are worth on assays."""
