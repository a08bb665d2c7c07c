"""What an NVIDIA GPU gets instead of plain torch: Triton kernels, paged attention over them, decode steps as CUDA graphs.

Nothing here is imported on a CPU. Every kernel has a twin in plain torch, which is what a CPU runs and what the tests
hold it to.
"""
