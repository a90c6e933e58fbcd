"""Triton kernels compiled as they are launched, without a launch: before any step needs them."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from triton import AsyncCompileMode
from triton.runtime.jit import JITFunction


class KernelFailed(Exception):
    """A kernel, of this name, cannot be compiled or loaded; ``reason`` says why in a line."""

    def __init__(self, kernel: str, cause: Exception) -> None:
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        # Triton shows the source first, and what is wrong with it last.
        self.reason = f"{type(cause).__name__}: {lines[-1] if lines else 'no details'}"[:500]
        self.kernel = kernel
        super().__init__(f"{kernel}: {self.reason}")


def compile_launches(walk: Callable[[], None], num_threads: int) -> dict[str, list[Any]]:
    """Run ``walk``, whose launches of kernels compile them for the device at hand and no more.

    Arguments count by type, alignment and the value of constants, so that tensors may be of the
    "meta" device. Later launches find the compiled kernels. No other thread launches meanwhile.

    Args:
        walk: launches kernels.
        num_threads: compilers that run at a time.

    Returns:
        By name of the kernel, Triton's ``CompiledKernel`` of each of its variants.

    Raises:
        KernelFailed: for the first that does not compile.
    """
    # Triton's mode is a context variable, which an error may leave set.
    return contextvars.copy_context().run(_compile_launches, walk, num_threads)


def _compile_launches(walk: Callable[[], None], num_threads: int) -> dict[str, list[Any]]:
    launch = JITFunction.run
    launches: list[tuple[str, Any]] = []

    def compile_kernel(
        self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any
    ) -> None:
        try:
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:
            raise KernelFailed(self.__name__, error) from error
        launches.append((self.__name__, kernel))

    with (
        ThreadPoolExecutor(num_threads, "compile") as threads,
        # Errors come out below, where the kernel's name is known.
        AsyncCompileMode(threads, ignore_errors=True),
    ):
        JITFunction.run = compile_kernel
        try:
            walk()
        finally:
            JITFunction.run = launch
        found: dict[str, dict[str, Any]] = {}
        for name, kernel in launches:
            try:
                # Found in memory, it is no future.
                done = kernel.result() if hasattr(kernel, "result") else kernel
            except Exception as error:
                raise KernelFailed(name, error) from error
            found.setdefault(name, {})[done.hash] = done
    return {name: list(variants.values()) for name, variants in found.items()}
