"""faiss, imported so that it and torch can live in one process.

On macOS the packages of faiss and of torch each carry an OpenMP runtime. Two in one process are an error to the second
one, and crash where both start threads, whichever is imported first. So there torch comes first, the second runtime is
allowed, and faiss keeps to one thread. Elsewhere two runtimes do no harm, and nothing is done.
"""

import os
import sys

import torch  # noqa: F401  before faiss

if sys.platform == "darwin":
    os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")  # read when a runtime starts

import faiss

if sys.platform == "darwin":
    faiss.omp_set_num_threads(1)

__all__ = ["faiss"]
