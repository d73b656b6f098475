"""Forty small mistakes, each of which a test must find: the proof that the suite loses nothing when it is changed.

``make mutants`` copies the tree, makes one mistake at a time in a copy, runs the few tests that are there for it and
says which one it died by. It fails where a mutant survives, where its tests do not run, and where the test that it died
by fails without it too (all of those run once more at the end).

A mutant is one line of one file; ``old`` occurs there once. To mend one: where the line has become another, make the
same mistake in it; where tests are renamed or moved, let ``tests`` name a file, and words for ``-k``, with one that
fails. It is narrow, since all of them run: seconds each. A mistake that nothing finds any more is a missing test, not a
mutant to drop.

A mistake in csrc/ is made in the kernels of one instruction set alone, ``isa`` ("best": what calls take by default);
where the processor has not got it, that is said.
"""

from __future__ import annotations

import argparse
import functools
import os
import queue
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from peftkern._version import __version__
from peftkern.backends.cpp import stamp

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 900  # seconds after which tests that do not end are an error


@dataclass(frozen=True)
class Mutant:
    """A mistake: ``old``, which ``file`` has once, becomes ``new``. ``lane`` is "unit" or "interpreter"."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    lane: str = "unit"
    isa: str = ""


def cpp(name: str, file: str, isa: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(f"cpp: {name}", f"csrc/{file}", old, new, tests, isa=isa)


def host(name: str, file: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(f"host: {name}", f"peftkern/{file}", old, new, tests)


def kernel(name: str, file: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(f"triton: {name}", f"peftkern/backends/triton/kernels/{file}", old, new, tests, "interpreter")


# fmt: off
MUTANTS = [
    cpp("dB with the scale of dropout", "cpu/bodies.h", "best", "ld : 1, p.scaling, p.dB",
        "ld : 1, p.scaling * p.dropout.scale, p.dB", "test_products.py -k each_option"),
    cpp("dropped at the threshold", "include/philox.h", "avx512", "_mm512_cmpge_epu16_mask(a, t)",
        "_mm512_cmpgt_epu16_mask(a, t)", "test_cpp.py -k mask_bits"),
    cpp("the mask's last word starts over", "include/philox.h", "avx2", "keep_words<1>(key, (first + word * 64) / 8,",
        "keep_words<1>(key, word * 8,", "test_cpp.py -k kept"),
    cpp("a block's mask counts from its first row", "cpu/fused.h", "avx2",
        "keep_bits_row(p.dropout, row + i + j, 0, p.K,", "keep_bits_row(p.dropout, i + j, 0, p.K,",
        "test_cpp.py -k edges"),
    cpp("last of an odd K", "cpu/few_rows.h", "avx2", "memcpy(lanes[i], w + i * ldw + k, (count - k) * sizeof(T));",
        "memcpy(lanes[i], w + i * ldw + k, (count - k - 1) * sizeof(T));", "test_cpp.py -k bare_product"),
    cpp("one column beyond half a tile", "cpu/fused.h", "avx512",
        "if (width > W) store_tail(high, target + W, width - W);",
        "if (width > W + 1) store_tail(high, target + W, width - W);", "test_cpp.py -k edges"),
    cpp("an odd row's neighbour is a number", "cpu/thin_bf16.h", "avx512bf16", "if (!bits && count % 2 == 0) {",
        "if (!bits) {", "test_cpp.py -k odd_row"),
    cpp("a row begins with a byte", "include/quantised.h", "avx2", "span(i & 1, count, out,", "span(0, count, out,",
        "test_cpp_weights.py -k decoded_as_materialised"),
    cpp("zero point of the second group of two", "include/quantised_steps.h", "avx2",
        "const int64_t other = smaller(block + 1, last);", "const int64_t other = block;",
        "test_cpp_weights.py -k extreme_scales"),
    cpp("second quantisation in one rounding", "include/quantised.h", "avx512",
        "product(w.nested_code[((const uint8_t *)w.scale)[block]], w.nested_absmax[block / 256]) + *w.nested_offset;",
        "w.nested_code[((const uint8_t *)w.scale)[block]] * w.nested_absmax[block / 256] + *w.nested_offset;",
        "test_cpp_weights.py -k second_quantisation"),
    cpp("halves of fp16 up", "include/vec.h", "baseline",
        "uint16_t((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13)",
        "uint16_t((bits + 0x1000 - (112u << 23)) >> 13)", "test_cpp.py -k fp16_conversions"),
    cpp("a third thread's sums of dA", "cpu/bodies.h", "best",
        "for (int i = 0; i < call.count; ++i, first +=", "for (int i = 0; i < smaller(2, call.count); ++i, first +=",
        "test_cpp.py -k threads"),
    cpp("the last of an odd row of pairs", "include/words.h", "avx512bf16", "(uint64_t(1) << left) - 1",
        "(uint64_t(1) << (left & ~1)) - 1", "test_cpp.py -k 'read_where_it_lies or everywhere'"),
    cpp("half a tile for one rank more", "cpu/fused.h", "best", "return R - i * kTileColumns <= W;",
        "return R - i * kTileColumns <= W + 1;", "test_cpp.py test_products.py"),
    cpp("s of a bank's first segment for all", "cpu/bank.h", "best",
        "call->s = segment.dA ? call->s + segment.s_begin : nullptr;", "call->s = segment.dA ? call->s : nullptr;",
        "test_multi_lora.py -k every_routing"),

    host("c is not held", "autograd.py", "None if scaling_tensor is None else scaling_tensor.detach().clone()",
        "None if scaling_tensor is None else scaling_tensor.detach()", "test_products.py -k scaling"),
    host("x is saved for a frozen A", "autograd.py", "rows if True in needs.lora_A else None, *(s if keep",
        "rows, *(s if keep", "test_products.py -k 'saved or may_change'"),
    host("dlora_bias by way of dy's dtype", "backends/base.py",
        "scaled(_total(dy), pair).to(pair.lora_bias.dtype)", "scaled(_total(dy), pair).to(dy.dtype)",
        "test_products.py -k not_rounded"),
    host("dropout's scale in DoRA's magnitude", "dora.py", "total = total * scale + (update.lora_B",
        "total = total + (update.lora_B",
        "test_dora_dropout.py -k pefts"),
    host("an expert of one row", "integrations/peft/low_rank_stack.py", "if rows.shape[0] or M == 0:",
        "if rows.shape[0] > 1 or M == 0:", "test_low_rank_stack.py test_experts.py -k 'grouped or zero_gradients'"),
    host("rows of the base take no place", "segments.py",
        "            spans.append(Segment(id, start, count))\n        start += count",
        "            spans.append(Segment(id, start, count))\n            start += count", "test_routing.py -k sorted"),
    host("merged weight after a load", "nn/lora_linear.py", "if self.merged_weight is not None:  # never stale",
        "if self.merged_bias is not None:  # never stale", "test_lora_linear.py -k merge"),
    host("hooks before a child's forward", "integrations/peft/read.py", '        or state["_forward_pre_hooks"]\n', "",
        "test_peft.py -k fallback"),
    host("autocast casts fp64", "functional.py",
        "tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else",
        "tensor.to(dtype) if tensor.is_floating_point() else", "test_torch_integration.py -k autocast"),
    host("a mask is drawn where none is dropped", "functional.py", "if dropout.threshold(dropout_p) == 0:\n",
        "if dropout.threshold(dropout_p) == 0:\n        dropout.draw_rng_state(x.device)\n",
        "test_dropout_mask.py -k draw"),
    host("an infinity in a file", "adapters/files.py", "if not tensor.isfinite().all():", "if tensor.isnan().any():",
        "test_hostile_adapter_files.py -k fit"),
    host("every rank of a row layout adds the bias", "ops/sharding.py",
        'and name != "w_scale" and any(rows) else value', 'and name == "w_scale" and any(rows) else value',
        "test_distributed.py -k row"),
    host("FLOPs of dx and dA together", "ops/flops.py", "+ K * (need_x + A) + N * B)",
        "+ K * (need_x or A) + N * B)", "test_flops.py -k hand_counts"),
    host("the last of the layers gives dx", "backends/base.py", "return dx.addmm_(dy, weight.materialize(dy.dtype))",
        "return torch.mm(dy, weight.materialize(dy.dtype), out=dx)", "test_shared_input_operators.py -k fp64"),
    host("dtype of a fake s", "ops/dispatch.py", "x.new_empty(M, update.R, dtype=wide) for",
        "x.new_empty(M, update.R) for", "test_torch_integration.py -k fake"),
    host("two counters too many", "backends/triton/tiles.py", "if blocks > COUNTERS - 2:", "if blocks > COUNTERS:",
        "test_triton_compile.py -k 'together or illegal'"),
    host("an entry for one rank of its power of two", "backends/triton/tables.py", 'f"R{padded(p.R)}"', 'f"R{p.R}"',
        "test_triton_tables.py -k power_of_two"),

    kernel("a last step of K in shrink", "shrink.py", "tl.cdiv(tl.cdiv(Q, BLOCK_Q), SLICES)",
        "tl.cdiv(Q // BLOCK_Q, SLICES)", "test_triton_interpreter.py -k 'combinations and split'"),
    kernel("a published block is never cleared", "protocol.py",
        'if tl.atomic_add(counter, 1, sem="relaxed") == readers:',
        'if tl.atomic_add(counter, 1, sem="relaxed") > readers:', "test_triton_protocols.py -k shared"),
    kernel("a shared T without dropout's scale", "fused.py", "store_block(T, (R, 1), t * t_scale, m0, 0,",
        "store_block(T, (R, 1), t, m0, 0,", "test_triton_interpreter.py -k dropout"),
    kernel("two terms of bf16 for three", "adapter.py", "3 if DTYPE == tl.bfloat16 else 2", "2",
        "test_triton_interpreter.py -k 'combinations and split'"),
    kernel("the mask of dx starts over in each tile", "finish.py",
        "DROP(drop_operands, low, m0 + tl.arange(0, BLOCK_M), p0)",
        "DROP(drop_operands, low, tl.arange(0, BLOCK_M), p0)", "test_triton_interpreter.py -k masks"),
    kernel("old memory for an adapter", "lookup.py",
        "found = found & (tl.load(bank[2] + place, mask=found, other=-1) == row)", "found = found & (row >= 0)",
        "test_bank_interpreter.py -k old_memory"),
    kernel("the first adapter's dropout scale for all", "lookup.py", "float_of(tl.load(drops[0] + e * 4 + 3))",
        "float_of(tl.load(drops[0] + 3))", "test_bank_training_interpreter.py -k every_routing"),
    kernel("scale of a scale in a later tile", "weight_load.py", "(((first & 255).to(tl.int32) + block) >> 8)",
        "(block >> 8)", "test_triton_weights.py -k loader"),
    kernel("the last run of the bias sums", "grad.py", "    for run in range(runs):\n",
        "    for run in range(tl.maximum(runs - 1, 1)):\n", "test_triton_interpreter.py -k tiles_of"),
]
# fmt: on


# ------------------------------------------------------------------------------------------------------------ one copy


@dataclass(frozen=True)
class Tree:
    """A copy of the repository, whose extension is made anew where a mistake is in C++."""

    root: Path
    objects: Path  # of csrc as it is, shared by all copies

    def run(self, lane: str, tests: Sequence[str]) -> tuple[int, list[str], str]:
        """pytest's exit code, the tests that failed, and the end of what it said."""
        variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        variables |= {"PYTHONPATH": f"{self.root}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        variables["PYTHONDONTWRITEBYTECODE"] = "1"  # two versions of a file within a second look the same to it
        marks: list[str] = []
        if lane == "interpreter":
            variables["TRITON_INTERPRET"], marks = "1", ["-m", "interpreter"]
        report = self.root / "report.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", *marks, f"--junitxml={report}", *tests]
        try:
            done = subprocess.run(
                command, cwd=self.root, env=variables, capture_output=True, text=True, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired:
            return -1, [], f"no end within {PATIENCE} s"
        return done.returncode, _failed(report), (done.stdout + done.stderr)[-2000:]

    def build(self, isa: str) -> None:
        """The extension from this copy's sources for one instruction set, and from ``objects`` for the others."""
        changed = {"stamp": self.root / "stamp.o", isa: self.root / "isa.o"}
        sources = _sources()
        for stem, target in changed.items():
            _compile(self.root, sources[stem], target)
        parts = [changed.get(stem, self.objects / f"{stem}.o") for stem in sources]
        _command(self.root, "-shared", *parts, "-o", self.extension, "-pthread", "-ldl")

    @property
    def extension(self) -> Path:
        return self.root / "peftkern" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def _failed(report: Path) -> list[str]:
    """The node ids of the tests that failed."""
    if not report.exists():
        return []
    cases = xml.etree.ElementTree.parse(report).iter("testcase")
    failed = (case for case in cases if case.find("failure") is not None or case.find("error") is not None)
    return [f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}" for case in failed]


def _copied(root: Path, objects: Path) -> Tree:
    """What git tracks or would, and the built extension."""
    tree = Tree(root, objects)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    shutil.copy2(Tree(ROOT, objects).extension, tree.extension)
    return tree


# ------------------------------------------------------------------------------------------------------- the extension


@functools.cache
def isa_flags() -> dict[str, list[str]]:
    """setup.py's. To be asked first before there are threads: it patches what they share."""
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, PEFTKERN_NO_EXT="1"):
        return runpy.run_path(str(ROOT / "setup.py"))["ISA_FLAGS"]


def _sources() -> dict[str, str]:
    """The extension's, by what a mutant calls an instruction set, or by their stem."""
    sets = {stem.removeprefix("isa_"): f"csrc/cpu/{stem}.cpp" for stem in ("isa_baseline", *isa_flags())}
    return sets | {"module": "csrc/module.cpp", "stamp": "csrc/stamp.cpp", "parallel": "csrc/cpu/parallel.cpp"}


def _command(folder: Path, *arguments: str | Path) -> None:
    command = [os.environ.get("CXX", "g++"), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"it does not compile: {done.stderr[-2000:]}")


def _compile(folder: Path, source: str, target: Path) -> None:
    """As setup.py does, in half the time: of -O3 no test knows but by its speed."""
    import pybind11

    flags = ["-std=c++17", "-O1", "-fexpensive-optimizations", "-fno-math-errno", "-fvisibility=hidden", "-fPIC"]
    flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags += [f'-DPEFTKERN_VERSION="{__version__}"', f'-DPEFTKERN_SOURCES="{stamp.digest(folder / "csrc")}"']
    _command(folder, *flags, *isa_flags().get(Path(source).stem, []), "-c", source, "-o", target)


def _instruction_sets() -> list[str]:
    """What this processor runs, best first."""
    from peftkern.backends.cpp.extension import extension

    module, reason, _ = extension()
    if module is None:
        raise SystemExit(f"mutants need the extension as it is: {reason}")
    return module.instruction_sets()


# -------------------------------------------------------------------------------------------------------- the verdicts


@dataclass
class Verdict:
    """``killer`` is the test that a mutant died by; ``error`` why that is no death."""

    mutant: Mutant
    seconds: float = 0.0
    killer: str = ""
    error: str = ""
    absent: str = ""  # the instruction set that is not here

    def __str__(self) -> str:
        said = self.absent and f"not run: this processor has no {self.absent}"
        said = said or self.error or (f"died by {self.killer}" if self.killer else "SURVIVED")
        return f"{self.mutant.name:48} {self.seconds:4.0f} s  {said}"


def _judge(mutant: Mutant, tree: Tree, isa: str) -> Verdict:
    """Make the mistake, run the tests, and undo it."""
    verdict, begin = Verdict(mutant), time.monotonic()
    path, kept = tree.root / mutant.file, tree.root / "extension.kept"
    text = path.read_text()
    try:
        path.write_text(text.replace(mutant.old, mutant.new))
        if isa:
            tree.extension.replace(kept)
            tree.build(isa)
        code, failed, said = tree.run(mutant.lane, ["-x", *_selection(mutant, isa)])
        if code == 1 and failed:
            verdict.killer = failed[0]
        elif code:
            verdict.error = f"ERROR: pytest ended with {code}: {said}"
    except RuntimeError as error:
        verdict.error = f"ERROR: {error}"
    finally:
        path.write_text(text)
        if kept.exists():
            kept.replace(tree.extension)
    verdict.seconds = time.monotonic() - begin
    return verdict


def _selection(mutant: Mutant, isa: str) -> list[str]:
    """pytest's arguments: without the cases of other instruction sets, where cases are of one."""
    words = [f"tests/{word}" if word.endswith(".py") else word for word in shlex.split(mutant.tests)]
    others = [name for name in ("baseline", "avx2", "avx512", "avx512bf16") if isa and name not in isa]
    if others:
        words[-1] = " and not ".join([f"({words[-1]})", *others])
    return words


def _acquit(verdicts: Sequence[Verdict], tree: Tree) -> None:
    """A test that fails without the mutant too has not found it."""
    for lane in ("unit", "interpreter"):
        dead = [verdict for verdict in verdicts if verdict.killer and verdict.mutant.lane == lane]
        if dead:
            code, failed, said = tree.run(lane, sorted({verdict.killer for verdict in dead}))
            for verdict in dead:
                if verdict.killer in failed or code not in (0, 1):
                    verdict.error = f"ERROR: {verdict.killer} fails without it: {said}"
                    print(verdict, flush=True)


def _checked(only: str) -> list[Mutant]:
    """Those whose name fits, after a look at where all of them are made."""
    wrong = [m.name for m in MUTANTS if m.old == m.new or (ROOT / m.file).read_text().count(m.old) != 1]
    if wrong or len({m.name for m in MUTANTS}) < len(MUTANTS):
        raise SystemExit(f"these mistakes are not made in exactly one place, or their names are not unique: {wrong}")
    return [m for m in MUTANTS if re.search(only, m.name)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="the mutants whose names it fits")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time")
    options = parser.parse_args()
    mutants, sets, begin = _checked(options.only), _instruction_sets(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        objects = Path(folder) / "objects"
        objects.mkdir()
        if any(mutant.isa for mutant in mutants):
            list(pool.map(lambda item: _compile(ROOT, item[1], objects / f"{item[0]}.o"), _sources().items()))
        trees: queue.SimpleQueue[Tree] = queue.SimpleQueue()
        for number in range(options.jobs):
            trees.put(_copied(Path(folder) / str(number), objects))

        def judge(mutant: Mutant) -> Verdict:
            isa = sets[0] if mutant.isa == "best" else mutant.isa
            if isa and isa not in sets:
                return Verdict(mutant, absent=isa)
            tree = trees.get()
            try:
                return _judge(mutant, tree, isa)
            finally:
                trees.put(tree)

        verdicts = []
        for verdict in pool.map(judge, mutants):
            print(verdict, flush=True)
            verdicts.append(verdict)
        _acquit(verdicts, trees.get())
    dead = sum(bool(verdict.killer) and not verdict.error for verdict in verdicts)
    absent = sum(bool(verdict.absent) for verdict in verdicts)
    rest = len(verdicts) - dead - absent
    print(f"{dead} died, {rest} did not, {absent} not run; {time.monotonic() - begin:.0f} s")
    return int(rest > 0)


if __name__ == "__main__":
    sys.exit(main())
