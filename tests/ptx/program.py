"""PTX as Triton writes it, taken apart: one entry, its parameters, and instructions with their operands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_OPERAND = re.compile(r"\{[^{}]*\}|\[[^\[\]]*(?:\{[^{}]*\}[^\[\]]*)?\]|[^,\s]+")


@dataclass(frozen=True)
class Instruction:
    """``@!%p1 add.s32 %r1, %r2, 3``: guard, negated, opcode's parts, and operands as they are written."""

    text: str
    guard: str | None
    negated: bool
    opcode: str
    parts: tuple[str, ...]
    operands: tuple[str, ...]


@dataclass
class Program:
    """What an entry declares, its instructions, and where its labels are among them."""

    name: str
    parameters: list[tuple[str, int]] = field(default_factory=list)  # name and bytes
    threads: int = 0
    registers: int = 0  # a thread's, at entry; 0 where it does not say
    widths: dict[str, int] = field(default_factory=dict)  # bits by a register's letters; predicates have 1
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)  # of branch targets


def parse(ptx: str) -> Program:
    """The one entry of ``ptx``.

    Raises:
        ValueError: for a second entry or a statement that is none of those known.
    """
    text = _COMMENT.sub("", ptx)
    entry = re.findall(r"\.entry\s+(\w+)\(", text)
    if len(entry) != 1:
        raise ValueError(f"expected one entry, got {entry}")
    program = Program(entry[0], widths={"_": 32})  # where what nobody wants goes
    head, body = text[text.index(".entry") :].split("{", 1)
    for kind, name, length in re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,\n]*\s(\w+)(?:\[(\d+)\])?", head):
        program.parameters.append((name, int(length) if length else int(kind[1:]) // 8))
    for directive in ("reqntid", "maxntid"):
        found = re.search(rf"\.{directive}\s+(\d+)", head)
        program.threads = int(found[1]) if found else program.threads
    found = re.search(r"\.maxnreg\s+(\d+)", head)
    program.registers = int(found[1]) if found else 0
    _parse_body(program, body)
    return program


def _parse_body(program: Program, body: str) -> None:
    # A scope's own registers and labels, such as those of each loop that waits, get its number.
    scopes: list[tuple[int, set[str]]] = [(0, set())]
    number = 0
    for statement in _statements(body):
        if statement == "{":
            number += 1
            scopes.append((number, set()))
        elif statement == "}":
            scopes.pop()
            if not scopes:
                return
        elif statement.startswith(".reg"):
            kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.+)", statement).groups()  # type: ignore[union-attr]
            for name in (name.strip() for name in names.split(",")):
                letters, count = re.fullmatch(r"(%?\w+?)(<\d+>)?", name).groups()  # type: ignore[union-attr]
                width = 1 if kind == "pred" else int(kind[1:])
                if count is None:
                    scopes[-1][1].add(letters)
                    letters = f"{letters}@{scopes[-1][0]}"
                program.widths[letters] = width
        elif statement.endswith(":"):
            label = statement[:-1]
            if not label.startswith("$"):
                scopes[-1][1].add(label)
            program.labels[_renamed(label, scopes)] = len(program.instructions)
        else:
            table = re.fullmatch(r"(?:(\S+):)?\s*\.branchtargets\s+(.*)", statement, re.DOTALL)
            if table:
                name = table[1] or next(reversed(program.labels))
                program.tables[name] = [label.strip() for label in table[2].split(",")]
            else:
                program.instructions.append(_instruction(statement, scopes))
    raise ValueError("the entry does not end")


def _statements(body: str) -> Iterator[str]:
    """Statements without their semicolons, labels with their colons, and the braces of scopes."""
    pending = ""
    for line in body.splitlines():
        line = line.strip()
        if not pending and (line in ("{", "}") or re.fullmatch(r"[\w$]+:", line)):
            yield line
        elif line.startswith((".loc", ".pragma")):
            continue
        else:
            *whole, pending = f"{pending} {line}".split(";")
            yield from filter(None, map(str.strip, whole))
            pending = pending.strip()


def _renamed(name: str, scopes: list[tuple[int, set[str]]]) -> str:
    for number, names in reversed(scopes):
        if name in names:
            return f"{name}@{number}"
    return name


def _instruction(statement: str, scopes: list[tuple[int, set[str]]]) -> Instruction:
    guard, negated, rest = None, False, statement
    if statement.startswith("@"):
        guard, rest = statement[1:].split(None, 1)
        negated = guard.startswith("!")
        guard = _renamed(guard.removeprefix("!"), scopes)
    opcode, operands = re.fullmatch(r"(\S+)\s*(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    found = tuple(
        re.sub(r"[\w%$.]+", lambda match: _renamed(match[0], scopes), re.sub(r"\s+", " ", operand))
        for operand in _OPERAND.findall(operands)
    )
    return Instruction(" ".join(statement.split()), guard, negated, opcode, tuple(opcode.split(".")), found)
