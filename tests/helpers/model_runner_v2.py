# SPDX-License-Identifier: Apache-2.0
"""Runs vLLM 0.32's Model Runner V2, the default on CUDA, on a machine without a GPU.

`vllm.v1.worker.cpu.model_runner` is that very runner on CPU tensors, and vLLM chooses it where Triton has a
"cpu" backend. No wheel on PyPI has one, but every Triton has an interpreter, which runs kernels as numpy on
CPU tensors. So this only says that there is a backend; Triton itself comes with vLLM (xgrammar needs it).

A process is started with the variables of `environment(RUNNER)`; each process of an engine calls
`install_from_environment()` before it imports vLLM. What that touches, all of vLLM 0.32 and Triton 3.7:

* `triton.backends.backends`, read by `vllm.triton_utils.importing`: gains "cpu". Nothing ever compiles.
* TRITON_INTERPRET, read where a kernel is decorated, thus when vLLM's modules are imported.
* `GridExecutor._init_args_hst` and `_restore_args_dev`: copy arguments from and to a device, which is none.
* `interpreter._patch_lang` and `interpreter_builder.options`: Triton's language is made to interpret once for
  each module and not at every call, and additions are not checked for overflow: half of a step's time.
* `interpreter._get_np_dtype`, `block_type.with_element_ty`, `InterpreterBuilder.get_block_ty`, and the
  shape of a `tensor`: what depends on a type alone is worked out once for it and not at every operation.
* `topk_topp_sampler.apply_top_k_top_p_triton`: its kernel calls a method of a loop's variable, which is a
  plain int in the interpreter; vLLM's own torch version stands in.
* `CpuPlatform.check_and_update_config`: turns asynchronous scheduling off, which both runners have on CUDA.

Not acted out: streams, pinned memory and everything else about *when* a device works.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

#: Model runner, and whether the scheduler runs a step ahead of it.
RUNNERS = ("v1", "v1-async", "v2", "v2-async")
_VARIABLE = "VTPRUNE_TEST_RUNNER"


def environment(runner: str) -> dict[str, str]:
    """Variables to start a process with whose engine shall have this runner, one of `RUNNERS`."""
    version, _, _ = runner.partition("-")
    chosen = {_VARIABLE: runner, "VLLM_USE_V2_MODEL_RUNNER": str(int(version == "v2"))}
    return chosen | ({"TRITON_INTERPRET": "1"} if version == "v2" else {})


def install_from_environment() -> None:
    """Have vLLM use the runner that `environment` asked for; nothing where it asked for none."""
    version, _, scheduling = os.environ.get(_VARIABLE, "v1").partition("-")
    if version == "v2":
        offer_triton()
    if scheduling == "async":
        _keep_async_scheduling()


def offer_triton() -> None:
    """Have vLLM find a Triton, once in a process; TRITON_INTERPRET must be set."""
    from triton import backends
    from triton.runtime import interpreter

    if "cpu" in backends.backends:
        return

    class InterpreterDriver:
        """What vLLM counts as a driver. Never active: torch's inductor would ask it for a target."""

        @staticmethod
        def is_active() -> bool:
            return False

    backends.backends["cpu"] = backends.Backend(compiler=None, driver=InterpreterDriver)  # type: ignore
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None
    interpreter._patch_lang = _patching_once(interpreter._patch_lang)
    _remember_types(interpreter)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.apply_top_k_top_p_triton = topk_topp_sampler.apply_top_k_top_p_pytorch


def _remember_types(interpreter: Any) -> None:
    from triton.language import core

    work_out, make = interpreter._get_np_dtype, core.tensor.__init__
    with_element, blocks = core.block_type.with_element_ty, dict[Any, Any]()

    def numpy_type(type: Any) -> Any:
        if (known := getattr(type, "known_numpy_type", None)) is None:
            known = type.known_numpy_type = work_out(type)
        return known

    def block_of(self: Any, element: Any) -> Any:
        known = self.__dict__.setdefault("known_blocks", {})
        # its own equality looks at these, and it has no hash
        key = element.name, getattr(element, "address_space", None)
        if key not in known:
            known[key] = with_element(self, element)
        return known[key]

    def block(self: Any, element: Any, shape: Any) -> Any:
        key = element.name, getattr(element, "address_space", None), tuple(shape)
        if key not in blocks:
            blocks[key] = core.block_type(element, shape)
        return blocks[key]

    def tensor_of_known_shape(self: Any, handle: Any, type: Any) -> None:
        if (known := getattr(type, "known_shape", None)) is None:
            make(self, handle, type)
            type.known_shape = self.numel, self.shape
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = known

    interpreter._get_np_dtype = numpy_type
    interpreter.InterpreterBuilder.get_block_ty = block
    core.block_type.with_element_ty = block_of
    core.tensor.__init__ = tensor_of_known_shape


def _patching_once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    class Kept:
        """What `patch` returns, and undoes nothing."""

        def restore(self) -> None:
            pass

    patched: set[str] = set()

    def patch_once(kernel: Any) -> Kept:
        if kernel.__module__ not in patched:
            patched.add(kernel.__module__)
            patch(kernel)
        return Kept()

    return patch_once


def _keep_async_scheduling() -> None:
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_and_keep(vllm_config: Any) -> None:
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = staticmethod(check_and_keep)
