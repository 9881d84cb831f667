#!/usr/bin/env python3
"""Rank the database pictures for every query, from stored descriptors."""

import sys

from patchnetvlad.commands.features import feature_match

if __name__ == "__main__":
    sys.exit(feature_match())
