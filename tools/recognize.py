#!/usr/bin/env python3
"""Find the places of one folder of pictures among those of another, in one command."""

import sys

from patchnetvlad.commands.recognize import recognize

if __name__ == "__main__":
    sys.exit(recognize())
