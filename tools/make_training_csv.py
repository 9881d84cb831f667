#!/usr/bin/env python3
"""Turn lists and ground truth into a table to train on."""

import sys

from patchnetvlad.commands.training import make_training_csv

if __name__ == "__main__":
    sys.exit(make_training_csv())
