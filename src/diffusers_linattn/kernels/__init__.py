"""Kernels in Triton, which is imported only when one of them runs."""
