"""Other people's live models on our ops: ``accelerate(model)`` and ``restore(model)``.

Residual blocks, norms and attentions of models that keep the structure of OpenAI's diffusion family or of
CLIP are found by their attributes and shapes, whatever package they come from. A replacement is made only
after it gave the module's own outputs on random weights and inputs (:mod:`glide_fast.accelerate.proof`); what
is not known is left alone, and ``accelerate.report(model)`` says so.

    import glide_fast
    model = glide_fast.accelerate(model)        # the same object, the same parameters
    print(glide_fast.accelerate.report(model))
    glide_fast.restore(model)

The module itself can be called, because ``glide_fast.accelerate`` names both it and its function.
"""

from __future__ import annotations

import sys
from types import ModuleType

from glide_fast.accelerate.products import Products
from glide_fast.accelerate.report import Entry, Report
from glide_fast.accelerate.walk import Memory, Model, accelerate, report, restore

__all__ = ["Entry", "Report", "accelerate", "report", "restore"]


class _Callable(ModuleType):
    def __call__(self, model: Model, *, memory: Memory = "full", conv: Products = "library") -> Model:
        return accelerate(model, memory=memory, conv=conv)


sys.modules[__name__].__class__ = _Callable
