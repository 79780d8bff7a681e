"""Opened sources: a guest's memory and device state, whatever file or memory they are read from."""
