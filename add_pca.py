#!/usr/bin/env python3
"""Add WPCA to a trained checkpoint."""

import sys

from patchnetvlad.commands.training import add_pca

if __name__ == "__main__":
    sys.exit(add_pca())
