#!/usr/bin/env python3
"""Fit a model on any pictures, without training."""

import sys

from patchnetvlad.commands.models import fit_model

if __name__ == "__main__":
    sys.exit(fit_model())
