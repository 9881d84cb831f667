#!/usr/bin/env python3
"""Fetch the published checkpoints."""

import sys

from patchnetvlad.commands.models import download_models

if __name__ == "__main__":
    sys.exit(download_models())
