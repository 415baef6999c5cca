"""``python -m lightning_mics.cli``: the ``mics`` command."""

import sys

from lightning_mics.cli import main

if __name__ == "__main__":
    sys.exit(main())
