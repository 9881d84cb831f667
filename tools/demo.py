#!/usr/bin/env python3
"""Extract, match and compare on the example places, as `make demo` does."""

import sys

from patchnetvlad.commands.examples import demo

if __name__ == "__main__":
    sys.exit(demo())
