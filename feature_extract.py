#!/usr/bin/env python3
"""Describe the pictures of a list and store their descriptors."""

import sys

from patchnetvlad.commands.features import feature_extract

if __name__ == "__main__":
    sys.exit(feature_extract())
