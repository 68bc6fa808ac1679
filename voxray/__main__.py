"""``python -m voxray`` is the command ``voxray``."""

from voxray.cli import main

if __name__ == "__main__":
    main()
