#!/usr/bin/env python3
"""Write lists and ground truth of a dataset as its authors distribute it, or of your own."""

import sys

from patchnetvlad.commands.datasets import make_dataset

if __name__ == "__main__":
    sys.exit(make_dataset())
