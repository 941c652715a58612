"""What can be said of the GPU path without a GPU: compiled, counted, interpreted and predicted numbers.

`python -m bench.gpu_static --help`. Nothing here claims that something ran on a GPU.
"""
