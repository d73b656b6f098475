"""The house's docstrings as Markdown, for the API's page.

A section is a label at the left margin with its text behind or below it, up to a blank line or the next label.
A formula keeps its lines; Args, Attributes and Raises become a list where they are one; the others are a paragraph.
"""

from __future__ import annotations

import re
import textwrap

import griffe

_LABEL = re.compile(r"(Formula|Args|Returns|Raises|Attributes|Numerics|Deterministic|Source|Shapes):(?: (.*))?")
_NAMES = re.compile(r"(\w+(?:, \w+)*): ")
_NEXT = re.compile(r"[;.] (?=\w+(?:, \w+)*: )")  # "A: of the first; B: of the second."


def markdown(docstring: str) -> str:
    """The docstring with its sections in Markdown."""
    parts: list[str] = []
    lines = docstring.splitlines()
    while lines:
        label = _LABEL.fullmatch(lines[0])
        if label is None:
            parts.append(lines.pop(0))
            continue
        section = [lines.pop(0)]
        while lines and lines[0].strip() and not _LABEL.fullmatch(lines[0]):
            section.append(lines.pop(0))
        parts += ["", *_section(label[1], label[2] or "", textwrap.dedent("\n".join(section[1:])).splitlines()), ""]
    return "\n".join(parts)


def _section(label: str, first: str, below: list[str]) -> list[str]:
    if label == "Formula":
        return ["**Formula**", "", "```text", *([first] if first else []), *below, "```"]
    items = _items(first, below) if label in ("Args", "Attributes", "Raises") else []
    if items:
        return [f"**{label}**", "", *items]
    return [f"**{label}**: {' '.join([first, *(line.strip() for line in below)]).strip()}"]


def _items(first: str, below: list[str]) -> list[str]:
    """``name: text`` as a list; nothing where the text is none."""
    texts: list[str] = [first] if first else []
    for line in below:
        if _NAMES.match(line) and not first:
            texts.append(line)
        elif texts:
            texts[-1] += " " + line.strip()
        else:
            return []
    texts = [part for text in texts for part in _NEXT.split(text)]
    if not all(_NAMES.match(text) for text in texts):
        return []
    return [_NAMES.sub(lambda names: f"* **{names[1]}**: ", text, count=1) for text in texts]


class HouseStyle(griffe.Extension):
    """Named in mkdocs.yml."""

    def on_object(self, *, obj: griffe.Object, **more: object) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
