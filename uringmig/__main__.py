"""``python -m uringmig`` is the command line."""

from uringmig.cli import main

if __name__ == "__main__":
    main()
