"""The whole way to a GPU, on a machine without one: layer, Function, dispatch, schedule, Triton's binder and launcher.

Within ``gpu()`` the Triton backend takes tensors on the CPU, compiles its kernels for that chip, and Triton launches
them into a driver's library of our own (driver.c), which records and runs nothing: no result has a meaning.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import pkgutil
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.nvidia import driver as nvidia

from peftkern import _env
from peftkern.backends.triton import backend, kernels, launch
from peftkern.backends.triton.arch import ARCHES, Arch
from peftkern.backends.triton.launch import operands
from peftkern.backends.triton.tiles import COUNTERS
from peftkern.ops import dispatch
from stand_in.record import Descriptor, Launch, Names, Pointer, RawLaunch, decode

__all__ = ["Descriptor", "Gpu", "Launch", "Pointer", "Recording", "gpu"]


class Recording:
    """The launches of one ``Gpu.recording`` block."""

    def __init__(self) -> None:
        self._raw: list[tuple[RawLaunch, Any]] = []
        self._products: list[tuple[int, operands.VendorProduct]] = []

    def launches(self, **tensors: Tensor) -> list[Launch]:
        """In order, with the addresses named after ``tensors``, which must be those of the calls, and still alive."""
        names = Names(tensors)
        found = [decode(raw, kernel, names) for raw, kernel in self._raw]
        for place, (before, product) in enumerate(self._products):
            arguments = {
                name: (names.pointer(tensor.data_ptr()), tuple(tensor.shape), tensor.stride())
                for name, tensor in (("left", product.left), ("right", product.right), ("out", product.out))
            }
            found.insert(before + place, Launch("vendor", "", (), (), 0, 0, {}, arguments))
        return found


class Gpu(nvidia.CudaDriver):
    """Triton's driver over the stand-in. ``stream``: the current one's handle, whose user sets it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.stream, self.arch, self.library = 0, ARCHES["sm_90"], library
        self._recording, self._products = None, 0
        self.kept_counters: dict[int, Tensor] = {}  # by stream
        self._one = torch.zeros(1, 1)
        # The number of the device is its capability: no GPU's, so that no cache of Triton's mixes them up.
        self.get_current_device = lambda: int(self.arch.name.removeprefix("sm_"))
        self.get_device_capability = lambda device: divmod(device, 10)
        self.get_current_stream = lambda device: self.stream
        self.set_current_device = lambda device: None

    def place(self, arch: Arch) -> None:
        """Be this chip, on the default stream."""
        self.arch, self.stream = arch, 0
        self.library.stand_in_device(self.get_current_device(), arch.units, arch.shared_memory)

    @property
    def count(self) -> int:
        """Launches and vendor's products since the process began."""
        return self.library.stand_in_count() + self._products

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recording]:
        """What is launched within the block, to be looked at after it."""
        found = self._recording = Recording()
        self.library.stand_in_record(1)
        try:
            yield found
        finally:
            self.library.stand_in_record(0)
            self._recording = None
        loaded = {kernel.function: kernel for kernel in _compiled()}
        for i in range(self.library.stand_in_recorded()):
            raw = RawLaunch.from_buffer_copy(self.library.stand_in_launch(i).contents)
            found._raw.append((raw, loaded[raw.function]))

    @property
    def named_counters(self) -> dict[str, Tensor]:
        """Those that the launches so far have made, by a name with the stream's number."""
        return {f"counters {stream}": one for stream, one in self.kept_counters.items()}

    def counters(self, like: Tensor, blocks: int = COUNTERS - 2) -> Tensor:
        """As on a GPU: one tensor a stream, kept."""
        if self.stream not in self.kept_counters:
            self.kept_counters[self.stream] = torch.zeros(COUNTERS, dtype=torch.int32)
        return self.kept_counters[self.stream]

    def multiply(self, product: operands.VendorProduct) -> None:
        """The vendor's product, which would be the CPU's: counted, and launched on one element."""
        self._products += 1
        if self._recording is not None:
            self._recording._products.append((self.library.stand_in_recorded(), product))
        self._one.addmm_(self._one, self._one)


@contextlib.contextmanager
def gpu(arch: str = "sm_90") -> Iterator[Gpu]:
    """Within the block, in every thread, the Triton backend runs calls on CPU tensors as on a GPU of this chip.

    Kernels stay compiled and loaded for the next block; all else is as before.
    Raises: RuntimeError within another, or where there is a real GPU, whose driver's library is loaded already.
    """
    if torch.cuda.is_available():
        raise RuntimeError("there is a GPU, whose driver cannot be stood in for")
    folder, driver = _driver()
    before = triton.runtime.driver._active
    if before is driver:
        raise RuntimeError("there is a stand-in already, and they are one at a time")
    driver.place(ARCHES[arch])
    with contextlib.ExitStack() as undo:
        undo.callback(_forget)
        undo.enter_context(mock.patch.dict(os.environ, PEFTKERN_BACKEND="triton", TRITON_LIBCUDA_PATH=folder.name))
        undo.enter_context(mock.patch.object(backend, "_interpreted", lambda: True))  # accepts tensors on the CPU
        undo.enter_context(mock.patch.object(backend, "arch_of", lambda device: driver.arch))
        undo.enter_context(mock.patch.object(operands.VendorProduct, "run", lambda product: driver.multiply(product)))
        for module in _modules("peftkern.backends.triton.launch"):
            if getattr(module, "counters", None) is operands.counters and module is not operands:
                undo.enter_context(mock.patch.object(module, "counters", driver.counters))
        undo.callback(triton.runtime.driver.set_active, before)
        triton.runtime.driver.set_active(driver)
        undo.callback(_disown)
        _forget()
        yield driver


def _forget() -> None:
    """Make the next call look again at which backend runs it."""
    for cached in (_env.settings, dispatch._select, nvidia.libcuda_dirs, nvidia.library_dirs):
        cached.cache_clear()
    launch.forget()


def _disown() -> None:
    """Kernels that outlive the block would look for a driver to unload them."""
    for kernel in _compiled():
        kernel.module = None


def _modules(package: str) -> list[Any]:
    found = importlib.import_module(package)
    return [importlib.import_module(f"{package}.{one.name}") for one in pkgutil.iter_modules(found.__path__)]


def _compiled() -> Iterator[Any]:
    """Every kernel of the package that this process has compiled for a stand-in and loaded."""
    numbers = {int(name.removeprefix("sm_")) for name in ARCHES if name.startswith("sm_")}
    functions = {value for module in _modules(kernels.__name__) for value in vars(module).values()
                 if isinstance(value, triton.JITFunction)}  # fmt: skip
    for function in functions:
        for number in numbers & function.device_caches.keys():
            yield from (one for one in function.device_caches[number][0].values() if one.function is not None)


@functools.cache
def _driver() -> tuple[tempfile.TemporaryDirectory[str], Gpu]:
    """The library, compiled and loaded once a process, in a folder that goes with it, and Triton's driver over it."""
    folder = tempfile.TemporaryDirectory(prefix="peftkern_stand_in_")
    path = Path(folder.name) / "libcuda.so.1"
    include = Path(nvidia.__file__).parent / "include"
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    flags = ["-O2", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1", "-pthread"]
    subprocess.run([compiler, *flags, Path(__file__).with_name("driver.c"), "-o", path], check=True)
    (Path(folder.name) / "libcuda.so").symlink_to(path.name)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.stand_in_count.restype = ctypes.c_uint64
    library.stand_in_recorded.restype = ctypes.c_size_t
    library.stand_in_launch.restype = ctypes.POINTER(RawLaunch)
    library.stand_in_launch.argtypes = [ctypes.c_size_t]
    with mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder.name):
        return folder, Gpu(library)
