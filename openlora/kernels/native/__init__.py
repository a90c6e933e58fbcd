"""CPU kernels in C, compiled on first use by the system's compiler and called through ctypes."""
