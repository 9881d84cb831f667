#!/usr/bin/env python3
"""Measure rankings, cities joined and apart, or another method's predictions."""

import sys

from patchnetvlad.commands.datasets import measure

if __name__ == "__main__":
    sys.exit(measure())
