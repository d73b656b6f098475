"""Builds the optional C++ extension; everything else about the package is in pyproject.toml.

Without a compiler the install is pure Python and says so. ``PEFTKERN_NO_EXT=1`` leaves the extension out,
``PEFTKERN_FORCE_EXT=1`` makes a failed build an error. Each ``csrc/cpu/isa_*.cpp`` is compiled for its own instruction
set and chosen at run time, so the wheel runs on any processor of the platform.
"""

import os
import platform
import runpy
import sys
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
VERSION_FILE = "peftkern/_version.py"


def extension() -> dict:
    """The setup() arguments that build peftkern._C, or none."""
    if os.environ.get("PEFTKERN_NO_EXT") == "1" or os.name == "nt":
        return {}
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext

    class BuildExtension(build_ext):
        """Per-file instruction sets, and a failure that costs speed rather than the install."""

        def build_extensions(self) -> None:
            compile_one = self.compiler._compile

            def compile_for_isa(obj, src, ext, cc_args, extra_postargs, pp_opts):
                flags = ISA_FLAGS.get(Path(src).stem, [])
                return compile_one(obj, src, ext, cc_args, [*extra_postargs, *flags], pp_opts)

            self.compiler._compile = compile_for_isa
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
    ParallelCompile("PEFTKERN_BUILD_JOBS", default=os.cpu_count() or 1).install()
    module = Pybind11Extension(
        "peftkern._C",
        sources,
        cxx_std=17,
        depends=[VERSION_FILE, *map(str, Path("csrc").rglob("*.*"))],
        define_macros=[("PEFTKERN_VERSION", f'"{version}"'), ("PEFTKERN_SOURCES", f'"{digest}"')],
        extra_compile_args=["-O3", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"],
        extra_link_args=["-pthread"] + (["-ldl"] if sys.platform == "linux" else []),
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
