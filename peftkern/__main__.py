"""``python -m peftkern``: what is here, and what the kernels compile to."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

Command = Callable[[argparse.Namespace], str]


def _kernels(options: argparse.Namespace) -> str:
    from peftkern.backends.triton import inspect_kernels

    return inspect_kernels.kernels_table(options.json)


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


# name: (what it prints, its function); each takes --json.
COMMANDS: dict[str, tuple[str, Command]] = {
    "env": ("versions, devices and each backend's state", _env),
    "kernels": ("registers, stack, shared memory and MMA kind of every Triton kernel on every target", _kernels),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one sub-command and print what it returns."""
    parser = argparse.ArgumentParser(prog="python -m peftkern", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (meaning, _) in COMMANDS.items():
        commands.add_parser(name, help=meaning).add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        print(COMMANDS[options.command][1](options))
    except ValueError as error:  # a bad environment variable
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
