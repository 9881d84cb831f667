#!/usr/bin/env python3
"""Make a search index of a database's global descriptors, once."""

import sys

from patchnetvlad.commands.features import build_index

if __name__ == "__main__":
    sys.exit(build_index())
