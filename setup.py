"""Builds the optional C++ extension; everything else about the package is in pyproject.toml.

Without a compiler the install is pure Python and says so. ``PEFTKERN_NO_EXT=1`` leaves the extension out,
``PEFTKERN_FORCE_EXT=1`` makes a failed build an error. Each ``csrc/cpu/isa_*.cpp`` is compiled for its own instruction
set and chosen at run time, so the wheel runs on any processor of the platform.

The sources compute on the vector types of GCC and clang, which MSVC's ``cl`` does not know. On Windows ``clang-cl``,
which comes with Visual Studio, compiles them with MSVC's headers, libraries and linker. Not built on Windows yet.
"""

import os
import platform
import runpy
import shutil
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

from setuptools import setup

X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
# GCC takes its own AVX-512 headers for uninitialised; clang does not know one of those warnings.
QUIET = ["-Wno-unknown-warning-option", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
ISA_FLAGS = {
    "isa_avx2": AVX2,
    "isa_avx512": [*AVX512, *QUIET],
    "isa_avx512bf16": [*AVX512, "-mavx512bf16", *QUIET],
}
WINDOWS = os.name == "nt"
if WINDOWS:
    COMPILE, LINK = ["/O2", "/clang:-fno-math-errno", "/W3"], []
else:
    COMPILE = ["-O3", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
    LINK = ["-pthread"] + (["-ldl"] if sys.platform == "linux" else [])
VERSION_FILE = "peftkern/_version.py"


def use_clang(compiler) -> None:
    """Have distutils' MSVC compile with clang-cl, and link what its __builtin_cpu_supports calls."""
    clang = shutil.which("clang-cl")
    if clang is None:
        raise RuntimeError("no clang-cl in PATH: it comes with Visual Studio's clang tools, or with LLVM")
    compiler.initialize()
    compiler.cc = clang
    if not X86:
        return
    resources = subprocess.run([clang, "/clang:-print-resource-dir"], capture_output=True, text=True, check=True).stdout
    compiler.add_library_dir(str(Path(resources.strip(), "lib", "windows")))
    compiler.add_library("clang_rt.builtins-x86_64")


def extension() -> dict:
    """The setup() arguments that build peftkern._C, or none."""
    if os.environ.get("PEFTKERN_NO_EXT") == "1":
        return {}
    from pybind11.setup_helpers import Pybind11Extension, build_ext

    class BuildExtension(build_ext):
        """Per-file instruction sets, and a failure that costs speed rather than the install."""

        def build_extensions(self) -> None:
            compile_all = self.compiler.compile

            def compile_each(sources, *, extra_postargs, **options):
                def compile_one(source):
                    flags = [*extra_postargs, *ISA_FLAGS.get(Path(source).stem, [])]
                    return compile_all([source], extra_postargs=flags, **options)

                with ThreadPool() as pool:  # one a core
                    return [objects[0] for objects in pool.map(compile_one, sources)]

            self.compiler.compile = compile_each
            if WINDOWS:
                use_clang(self.compiler)
            super().build_extensions()

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if os.environ.get("PEFTKERN_FORCE_EXT") == "1":
                    raise
                print(f"peftkern: no C++ extension ({error}); the install is pure Python", file=sys.stderr)

    # What peftkern/backends/cpp/extension.py wants to see in the file before it loads it.
    digest = runpy.run_path("peftkern/backends/cpp/stamp.py")["digest"](Path("csrc"))
    version = runpy.run_path(VERSION_FILE)["__version__"]
    sources = ["csrc/module.cpp", "csrc/stamp.cpp", "csrc/cpu/parallel.cpp", "csrc/cpu/isa_baseline.cpp"]
    if X86:
        sources += [f"csrc/cpu/{stem}.cpp" for stem in ISA_FLAGS]
    module = Pybind11Extension(
        "peftkern._C",
        sources,
        cxx_std=17,
        depends=[VERSION_FILE, *map(str, Path("csrc").rglob("*.*"))],
        define_macros=[("PEFTKERN_VERSION", f'"{version}"'), ("PEFTKERN_SOURCES", f'"{digest}"')],
        extra_compile_args=COMPILE,
        extra_link_args=LINK,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
