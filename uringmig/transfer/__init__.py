"""Requests of one channel: which ones, which are in flight, and the thread that sees to them."""
