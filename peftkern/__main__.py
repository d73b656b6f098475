"""``python -m peftkern``: what is here, what the kernels compile to, and what is fastest on this GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

Command = Callable[[argparse.Namespace], str]
Options = Callable[[argparse.ArgumentParser], None]


def _inspector() -> ModuleType:
    """The module that compiles the kernels: a source checkout's, beside the package, and no part of a wheel."""
    tests = Path(__file__).parent.parent / "tests"
    if not (tests / "binaries").is_dir():
        raise ValueError("peftkern kernels needs a source checkout: there is no tests/binaries beside the package")
    sys.path.insert(0, str(tests))
    from binaries import inspect_kernels

    return inspect_kernels


def _kernels(options: argparse.Namespace) -> str:
    return _inspector().kernels_table(options.json)


def _tune(options: argparse.Namespace) -> str:
    if options.cpu:
        from peftkern.backends.cpp import tune

        return tune.run()
    from peftkern.backends.triton.tune import command, search
    from peftkern.ops import dispatch

    reference, unavailable = dispatch.backend_named("reference"), dispatch.backend_named("triton").unavailable()
    try:
        return command.run(options, reference, unavailable)
    except (OSError, search.DeviceLost) as error:  # a folder that cannot be written; a kernel that broke the device
        raise SystemExit(f"peftkern tune: {error}") from error


def _tune_options(parser: argparse.ArgumentParser) -> None:
    from peftkern.backends.triton.tune import command

    command.add_options(parser)
    text = "instead, in two minutes: from how many rows on the C++ kernels' own product is ahead of torch's here"
    parser.add_argument("--cpu", action="store_true", help=text)


def _env(options: argparse.Namespace) -> str:
    from peftkern.environment import env_report

    report = env_report()
    return json.dumps(report, indent=2) if options.json else "\n".join(_lines(report))


def _lines(report: dict[str, object], indent: str = "") -> list[str]:
    lines = []
    for name, value in report.items():
        lines += (
            [f"{indent}{name}:", *_lines(value, indent + "  ")]
            if isinstance(value, dict)
            else [f"{indent}{name}: {value}"]
        )
    return lines


# name: (what it does, its function, its own options); each takes --json.
COMMANDS: dict[str, tuple[str, Command, Options | None]] = {
    "env": ("versions, devices and each backend's state", _env, None),
    "kernels": (
        "registers, stack, shared memory and MMA kind of every Triton kernel on every target", _kernels, None,
    ),
    "tune": (
        "measure the schedules and tiles of the Triton kernels on this GPU, or (--cpu) the products of this CPU",
        _tune, _tune_options,
    ),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run one sub-command and print what it returns.

    Returns: 0; 2 for options or an environment that make no sense; 130 after Ctrl-C.
    Raises: SystemExit, with code 2 from the parser and 1 with a message for what failed on the way.
    """
    parser = argparse.ArgumentParser(prog="python -m peftkern", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (meaning, _, add_options) in COMMANDS.items():
        command = commands.add_parser(name, help=meaning)
        command.add_argument("--json", action="store_true", help="print JSON")
        if add_options is not None:
            add_options(command)
    options = parser.parse_args(arguments)
    try:
        print(COMMANDS[options.command][1](options))
    except ValueError as error:  # a bad option or environment variable
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
