"""Triton implementations of the ops, one family a file; installed as `glide_fast.kernels`.

This is the door for the CUDA key (ROCm uses the same): a module here registers its kernels by

    from glide_fast.ops.dispatch import LIBRARY

    LIBRARY.impl("group_norm", group_norm_kernel, "CUDA")

and names its ops in REGISTERED. `glide_fast.ops` imports this package when Triton is installed. Nothing is
registered yet: on CUDA the reference serves every op.
"""

REGISTERED: tuple[str, ...] = ()
