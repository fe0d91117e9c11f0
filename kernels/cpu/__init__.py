"""The operations compiled for the CPU with numba.

numba sets the size of the OpenMP pool that it shares with torch, and knows no OMP_NUM_THREADS: it
is told here, before anything imports it.
"""

import os

if (_num_threads := os.environ.get("OMP_NUM_THREADS", "").split(",")[0]).isdigit():
    os.environ.setdefault("NUMBA_NUM_THREADS", _num_threads)
