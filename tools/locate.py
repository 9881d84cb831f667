#!/usr/bin/env python3
"""Say where pictures were taken, with a radius of uncertainty."""

import sys

from patchnetvlad.commands.places import locate

if __name__ == "__main__":
    sys.exit(locate())
