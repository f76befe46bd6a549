"""The first thing that a process with interpreted kernels imports: before torch and Triton."""

import os
import warnings


def start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore", RuntimeWarning)  # integers wrap, as they do on a GPU
