# SPDX-License-Identifier: Apache-2.0
"""Let a CUDA build of torchvision be imported beside a CPU build of torch.

vLLM's LLaVA imports torchvision for its image transforms, which are plain Python. Where only the CUDA build
of torchvision can be had, its compiled operators do not load beside CPU torch. `torchvision.extension` notes
that and goes on, but `torchvision._meta_registrations`, imported next, registers fake kernels for two
operators all the same and dies with "operator torchvision::nms does not exist". Declaring the two in between
is enough. They get no kernels, so calling one still fails; no model served here calls them.

`tools/setup_env.py` copies this file into an environment that needs it, with a `.pth` file that runs
`install()` at the start of every process there. It therefore imports next to nothing, and leaves torchvision
alone where its own operators load.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_EXTENSION = "torchvision.extension"
# What torchvision 0.28 registers fake kernels for, whether or not its library was loaded.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[object] = []  # torch forgets a Library's operators once the object is collected


def _declare_missing_operators(extension: ModuleType) -> None:
    """Declare the operators if `torchvision.extension`, just executed, could not load its library."""
    if extension._has_ops() or _declared:
        return
    from torch import library  # torch is loaded already: torchvision imports it before its extension

    operators = library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        operators.define(schema)
    _declared.append(operators)


class _ExtensionFinder:
    """Finds `torchvision.extension` as usual, and adds a step after its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        if fullname != _EXTENSION:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_declare(module: ModuleType) -> None:
            execute(module)
            _declare_missing_operators(module)

        spec.loader.exec_module = execute_and_declare  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Watch for the import of `torchvision.extension` in this process. Idempotent."""
    # By name: an earlier call may have come from the copy in site-packages.
    if not any(type(finder).__name__ == _ExtensionFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _ExtensionFinder())
