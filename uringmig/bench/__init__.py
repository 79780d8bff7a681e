"""What a directory can do, measured in half a minute: the short answer of ``uringmig bench``."""
