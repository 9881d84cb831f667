#!/usr/bin/env python3
"""Draw the modules of the package with the imports between them."""

import sys

from patchnetvlad.commands.architecture import draw_architecture

if __name__ == "__main__":
    sys.exit(draw_architecture())
