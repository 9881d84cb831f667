#!/usr/bin/env python3
"""Run a dataset's whole chain and set the recalls beside the known ones."""

import sys

from patchnetvlad.commands.datasets import reproduce

if __name__ == "__main__":
    sys.exit(reproduce())
