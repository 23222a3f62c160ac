"""Commands around a checkpoint directory: make, fetch, convert, check."""
