#!/usr/bin/env python3
"""Poses of queries from their matches, scored, and as a submission to the benchmark."""

import sys

from patchnetvlad.commands.places import evaluate_poses

if __name__ == "__main__":
    sys.exit(evaluate_poses())
