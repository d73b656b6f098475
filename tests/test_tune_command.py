"""``python -m peftkern tune`` from outside: options, exit codes, the bar, and how a GPU is timed. No GPU."""

from __future__ import annotations

import dataclasses
import io
from types import SimpleNamespace

import pytest
import torch
from test_triton_tables import H200
from test_tune import CELL, options

from peftkern import __main__ as program
from peftkern.backends.triton.tune import command
from peftkern.backends.triton.tune.progress import Progress
from peftkern.backends.triton.tune.search import DeviceLost

pytestmark = pytest.mark.usefixtures("cache")


def test_without_a_gpu_there_is_a_message_and_code_2(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main(["tune"]) == 2
    assert "GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shape", "4096"], ["--shape", "0x16"], ["--rows", "1,x"], ["--rows", "0"], ["--rank", "1024"],
        ["--dropout", "1"], ["--dropout", "nan"], ["--dtype", "int8"], ["--adapters", "bf16"], ["--weight", "nf5"],
        ["--minutes", "soon"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_bad_options_are_named(arguments: list[str], capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["tune", *arguments])
    assert stop.value.code == 2 and f"argument {arguments[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["0", "nan"])
def test_no_time_is_an_error(minutes: str, capsys):
    assert program.main(["tune", "--minutes", minutes]) == 2
    assert f"--minutes {minutes}" in capsys.readouterr().err


def test_tuning_under_the_batch_invariant_mode_is_refused(dispatch_env, capsys):
    dispatch_env(PEFTKERN_BATCH_INVARIANT="1")
    assert program.main(["tune"]) == 2 and "BATCH_INVARIANT" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError("read-only file system"), DeviceLost("the device failed")], ids=repr)
def test_failures_on_the_way_are_one_line_and_code_1(error: Exception, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(command, "run", fail)
    with pytest.raises(SystemExit, match=str(error)):
        program.main(["tune"])
    monkeypatch.setattr(command, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert program.main(["tune"]) == 130


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_redrawn_on_a_terminal_and_lines_elsewhere(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: SimpleNamespace(columns=60))
    for stream in (Terminal(), io.StringIO()):
        now = iter([0.0, 60.0, 90.0])
        progress = Progress(stream, 4, 1000.0, lambda now=now: next(now))
        progress.step(1, "one " + "x" * 100)
        progress.step(2, "two")
        progress.close()
        text = stream.getvalue()
        assert "1/4 3:00 left  one" in text and "2/4 1:30 left  two" in text
        drawn = text.split("\r")
        if stream.isatty():
            assert "\n" not in text and "[######..................]" in text
            assert max(map(len, drawn)) < 60 and not drawn[-2].strip() and len(drawn[2]) >= len(drawn[1])
        else:
            assert len(drawn) == 1 and text.count("\n") == 2 and "[" not in text


def test_the_time_left_is_never_more_than_the_budget():
    stream, now = io.StringIO(), iter([0.0, 60.0])
    Progress(stream, 100, 120.0, lambda: next(now)).step(1, "slow")
    assert " 1:00 left" in stream.getvalue()


# ---------------------------------------------------------------------------------------------------- the GPU's timer


@pytest.mark.parametrize("memory", [2**30, 2**34, 2**38])
def test_the_cache_is_flushed_before_each_timing(memory: int, monkeypatch):
    """Against a GPU that only keeps a diary."""
    pytest.importorskip("triton")
    from peftkern.backends.triton.tune.device import EventTimer

    diary, sizes, L2 = [], [], 50 * 2**20
    names = iter(("start", "end"))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.name = next(names)

        def record(self) -> None:
            diary.append(self.name)

        def synchronize(self) -> None:
            diary.append(f"wait for {self.name}")

        def elapsed_time(self, end: Event) -> float:
            assert (self.name, end.name) == ("start", "end")
            return 2.5

    def zeros(size: int, device: torch.device) -> SimpleNamespace:
        sizes.append(size * torch.float32.itemsize)
        return SimpleNamespace(sum=lambda: diary.append("flush"))  # it reads, and has nothing that writes

    properties = SimpleNamespace(L2_cache_size=L2, total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "zeros", zeros)
    timer = EventTimer(torch.device("cuda"))
    assert [timer(lambda: diary.append("run")) for _ in range(2)] == [pytest.approx(2.5e-3)] * 2
    assert diary == ["flush", "start", "run", "end", "wait for end"] * 2
    assert 2 * L2 <= sizes[0] <= max(2 * L2, memory // 16) and len(sizes) == 1


def test_it_tunes_the_chip_that_is_there(monkeypatch):
    """``run`` asks for the device's own figures and measures by events."""
    pytest.importorskip("triton")
    from peftkern.backends.triton.tune import device

    seen = {}
    arch = dataclasses.replace(H200, units=114, product="NVIDIA H100 PCIe")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(command, "arch_of", lambda found: arch if found == torch.device("cuda", 1) else None)
    monkeypatch.setattr(device, "EventTimer", lambda found: "timer")
    monkeypatch.setattr(device, "DeviceBench", lambda *arguments: arguments)
    monkeypatch.setattr(
        command, "measure", lambda options, arch, bench_of: seen.update(arch=arch, bench=bench_of(CELL))
    )
    command.run(options(), "reference", None)
    assert seen == {"arch": arch, "bench": (CELL, arch, torch.device("cuda", 1), "reference", "timer")}
