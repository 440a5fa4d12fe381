"""From image files to a searchable index: scan, decode, encode, store, coarse search."""
