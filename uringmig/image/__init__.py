"""One mapped-ram image: its stream parsed, its manifest and digests."""
