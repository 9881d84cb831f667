#!/usr/bin/env python3
"""Render example pictures with their lists, ground truth and geometry."""

import sys

from patchnetvlad.commands.examples import render_example_places

if __name__ == "__main__":
    sys.exit(render_example_places())
