"""One mapped-ram image: its stream parsed, its windows settled, its end written, its manifest."""
