"""``python -m fltac``."""

from fltac.cli import main

if __name__ == "__main__":
    main()
