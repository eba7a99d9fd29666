"""Triton kernels with products on a CPU, run by Triton's interpreter."""

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    # Its products are numpy's. OpenBLAS's kernels for Haswell and Zen sum a row in another order where it lies
    # elsewhere in a tile; this one does not, and runs on every x86-64.
    "OPENBLAS_CORETYPE": "Nehalem",
}
