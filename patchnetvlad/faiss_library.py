"""faiss, imported so that it and torch can live in one process.

On macOS the packages of faiss and of torch each carry an OpenMP runtime. Two in one process are an error to the second
one, and crash where both start threads, whichever is imported first. So there torch comes first, the second runtime is
allowed, and faiss keeps to one thread. Elsewhere two runtimes do no harm.

faiss compares few queries one by one, each with all of the database, and many together by matrix products. Releases
that count the queries' numbers rather than the queries draw the line at 128,000: 200 queries of 512 dimensions read a
large database 200 times.
"""

import os
import sys

import torch  # noqa: F401  before faiss

if sys.platform == "darwin":
    os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")  # read when a runtime starts

import faiss

if sys.platform == "darwin":
    faiss.omp_set_num_threads(1)

_NUMBERS_TOGETHER = 8192  # of queries: 16 of 512 dimensions, where a product begins to be several times as fast
if faiss.cvar.distance_compute_blas_threshold > _NUMBERS_TOGETHER:
    faiss.cvar.distance_compute_blas_threshold = _NUMBERS_TOGETHER

__all__ = ["faiss"]
