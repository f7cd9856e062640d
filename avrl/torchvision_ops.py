"""timm and torchvision, also where the latter's compiled half does not load. Take both from here and nowhere else.

Beside a CPU-only torch, PyPI's torchvision (built for CUDA) cannot load its ``_C`` library; its import then
dies with "operator torchvision::nms does not exist", and timm imports torchvision unguarded. Torchvision only
asks for the two operators in order to say what shape they give, so declaring their schemas is enough;
`torchvision.io` and the compiled `torchvision.ops` stay unavailable there, and nothing here uses them. A
healthy torchvision is left alone.

    from avrl.torchvision_ops import timm    # `import timm` would be sorted before the cure
"""

from __future__ import annotations

import importlib
from typing import Any

# Held for the life of the process: a Library takes its operators with it when it is collected.
_declared: list[Any] = []


def cure() -> None:
    """Make ``import torchvision`` work. Does nothing where it works already.

    Raises:
        RuntimeError: torchvision fails for another reason than its missing operators.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error) or _declared:
            raise
        torch_library: Any = importlib.import_module("torch.library")
        library = torch_library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        importlib.import_module("torchvision")


cure()

# By this call and not by a statement: sorted imports would put it before the cure.
timm: Any = importlib.import_module("timm")
torchvision: Any = importlib.import_module("torchvision")

__all__ = ["cure", "timm", "torchvision"]
