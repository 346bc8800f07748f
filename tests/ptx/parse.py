"""From the text of a PTX module to its instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# An operand is text, or a list of texts where the PTX has a vector in braces.
Operand = str | list[str]


@dataclass
class Instruction:
    """One instruction.

    Attributes:
        index: Place in the program.
        predicate: The register that guards it.
        negated: Whether the guard is negated.
        op: Name and modifiers, separated by dots.
        operands: In the order of the text.
        where: The place in Triton's source, as the PTX names it.
        line: Of the PTX.
        text: As it stands there, without the guard.
    """

    index: int
    predicate: str | None
    negated: bool
    op: str
    operands: list[Operand]
    where: str
    line: int
    text: str

    @property
    def parts(self) -> list[str]:
        return self.op.split(".")


@dataclass
class Program:
    """A kernel.

    Attributes:
        name: Of the entry.
        parameters: Name and type of each.
        threads: Of one program (CTA).
        code: The instructions.
        labels: The instruction that each label stands before.
        registers: The type of each.
    """

    name: str
    parameters: list[tuple[str, str]]
    threads: int
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)


_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)(.*?)\n\{(.*?)\n\}", re.S)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+(?:\.ptr\s+\.global\s+\.align\s+\d+\s+)?(\w+)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>")
_LABEL = re.compile(r"(\$\w+):\s*")
_GUARD = re.compile(r"@(!?)(%\w+)\s+")
# Of a stack that nothing is on.
_STACK_POINTERS = (".reg .b64 \t%SP;", ".reg .b64 \t%SPL;")
_DIRECTIVES = (".file", ".section", ".pragma", ".local")


def split_operands(text: str) -> list[Operand]:
    """Split at commas outside brackets; ``{a, b}`` becomes a list, ``[a+b]`` stays text."""
    if "{" not in text and "[" not in text:
        return [operand for part in text.split(",") if (operand := part.strip())]
    found: list[Operand] = []
    depth, start = 0, 0
    for i, c in enumerate(text + ","):
        if c in "{[":
            depth += 1
        elif c in "}]":
            depth -= 1
        elif c == "," and depth == 0:
            operand = text[start:i].strip()
            start = i + 1
            if operand.startswith("{"):
                found.append([part.strip() for part in operand[1:-1].split(",")])
            elif operand:
                found.append(operand)
    return found


def parse(ptx: str) -> Program:
    """Return the program of a module with one entry."""
    entries = list(_ENTRY.finditer(ptx))
    if len(entries) != 1:
        raise ValueError(f"the machine runs modules with one entry, this one has {len(entries)}")
    entry = entries[0]
    name, parameters, attributes, body = entry.groups()
    threads = re.search(r"\.reqntid (\d+)", attributes)
    if threads is None:
        raise ValueError(f"{name} does not say how many threads a program has: .reqntid is missing")
    named = [(m[2], m[1]) for m in _PARAMETER.finditer(parameters)]
    program = Program(name, named, int(threads[1]))
    first_line = ptx[: entry.start(4)].count("\n") + 1
    where = pending = ""
    for number, raw in enumerate(body.split("\n"), first_line):
        text, _, comment = raw.partition("//")
        text = text.strip()
        if text.startswith(".loc"):
            where = comment.strip() or where
            continue
        if text.startswith(".reg"):
            _declare(program, text, number)
            continue
        if not text or text.startswith(_DIRECTIVES):
            continue
        while label := _LABEL.match(text):
            program.labels[label[1]] = len(program.code)
            text = text[label.end() :]
        pending += " " + text
        while ";" in pending:
            statement, _, pending = pending.partition(";")
            _append(program, statement.strip(), where, number)
    if pending.strip(" {}"):
        raise ValueError(f"PTX that the machine does not understand: {pending.strip()}")
    return program


def _declare(program: Program, text: str, line: int) -> None:
    if text in _STACK_POINTERS:
        return
    registers = _REGISTERS.match(text)
    if not registers:
        raise ValueError(f"registers that the machine does not understand, line {line}: {text}")
    for i in range(int(registers[3])):
        program.registers[f"{registers[2]}{i}"] = registers[1]


def _append(program: Program, text: str, where: str, line: int) -> None:
    if not text:
        return
    predicate, negated = None, False
    if guard := _GUARD.match(text):
        predicate, negated = guard[2], bool(guard[1])
        text = text[guard.end() :]
    op, *rest = text.split(None, 1)
    found = split_operands(rest[0] if rest else "")
    index = len(program.code)
    program.code.append(Instruction(index, predicate, negated, op, found, where, line, text))
