#!/usr/bin/env python3
"""Compare a camera's frames with a reference frame."""

import sys

from patchnetvlad.commands.pairs import match_realtime

if __name__ == "__main__":
    sys.exit(match_realtime())
