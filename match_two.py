#!/usr/bin/env python3
"""Compare two pictures and draw their matches."""

import sys

from patchnetvlad.commands.pairs import match_two

if __name__ == "__main__":
    sys.exit(match_two())
