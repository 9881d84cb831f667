#!/usr/bin/env python3
"""Make the bundled learned model again: train, whiten, join with the patches of RootSIFT."""

import sys

from patchnetvlad.commands.bundled_model import make_bundled_model

if __name__ == "__main__":
    sys.exit(make_bundled_model())
