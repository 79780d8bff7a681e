"""The version, where neither pip's metadata nor anything else has to be loaded for it."""

from typing import Final

VERSION: Final = "0.1.0"
