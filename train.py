#!/usr/bin/env python3
"""Train on Mapillary Street-Level Sequences or on one's own pictures."""

import sys

from patchnetvlad.commands.training import train

if __name__ == "__main__":
    sys.exit(train())
