"""What the machine reports: findings about a run, and refusals of what it does not know."""

from __future__ import annotations

from dataclasses import dataclass

from tests.ptx.parse import Instruction


class Unsupported(Exception):
    """The machine does not know an instruction, a modifier or an operand; it never guesses."""


# Kinds of findings, by their first words, that are reported and do not fail a run.
MILD = ("benign", "formal")


@dataclass
class Finding:
    """Something wrong, or worth knowing, about an instruction.

    Attributes:
        kind: What it is; those that begin with one of ``MILD`` are no failure.
        line: Of the PTX.
        where: The place in Triton's source, as the PTX names it.
        text: The instruction.
        detail: An example.
        count: How often it was found.
    """

    kind: str
    line: int
    where: str
    text: str
    detail: str
    count: int = 1

    @property
    def mild(self) -> bool:
        return self.kind.startswith(MILD)

    def __str__(self) -> str:
        where = f"{self.kind} x{self.count} at PTX line {self.line}: {self.text} | {self.where}"
        return f"{where} | {self.detail}" if self.detail else where


class Findings(dict[tuple[str, int], Finding]):
    """Findings of a run, one for each kind and instruction."""

    def add(self, kind: str, instruction: Instruction, detail: str = "") -> None:
        """Note a finding; of several at one instruction the first is the example."""
        key = (kind, instruction.line)
        if key in self:
            self[key].count += 1
            return
        text = instruction.text[:160]
        self[key] = Finding(kind, instruction.line, instruction.where, text, detail)
