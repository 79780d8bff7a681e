"""Guests' memory for other tools: images converted, and compared with each other."""
