"""Straight pieces of a program as Python functions of a warp, whose registers are arrays of 32 lanes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arithmetic import bits_of, function_of, multiplied
from .memory import SHARED_BASE
from .program import Instruction, Program

LANES = 32
_DTYPES = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}
# What other warps or units may notice, or what chooses the next instruction: for block.py, by these names. By the whole
# opcode: whatever else it says may mean another thing.
_SHARED = r"(\.shared(::cta)?)"
EVENTS = {
    "bra": r"bra(\.uni)?",
    "brx": r"brx\.idx",
    "ret": r"ret",
    "bar.warp": r"bar\.warp\.sync",
    "bar": r"(bar|barrier)\.sync",
    "fence": r"fence\.proxy\.async(\.shared::cta)?",
    "setmaxnreg": r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32",
    "griddepcontrol.launch_dependents": r"griddepcontrol\.launch_dependents",
    "griddepcontrol.wait": r"griddepcontrol\.wait",
    "mbarrier.init": rf"mbarrier\.init{_SHARED}\.b64",
    "mbarrier.inval": rf"mbarrier\.inval{_SHARED}\.b64",
    "mbarrier.arrive": rf"mbarrier\.arrive{_SHARED}\.b64",
    "mbarrier.expect": rf"mbarrier\.arrive\.expect_tx{_SHARED}\.b64",
    "mbarrier.try_wait": rf"mbarrier\.try_wait\.parity{_SHARED}\.b64",
    "wgmma.fence": r"wgmma\.fence\.sync\.aligned",
    "wgmma.mma_async": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k(16\.f32\.(f16\.f16|bf16\.bf16)|8\.f32\.tf32\.tf32)",
    "wgmma.commit": r"wgmma\.commit_group\.sync\.aligned",
    "wgmma.wait": r"wgmma\.wait_group\.sync\.aligned",
    "tma.load": r"cp\.async\.bulk\.tensor\.[1-5]d\.shared::(cta|cluster)\.global\.mbarrier::complete_tx::bytes",
    "tma.store": r"cp\.async\.bulk\.tensor\.[1-5]d\.global\.shared::cta\.bulk_group",
    "tma.commit": r"cp\.async\.bulk\.commit_group",
    "tma.wait": r"cp\.async\.bulk\.wait_group(\.read)?",
    "cp.async": r"cp\.async\.(ca|cg)\.shared\.global",
    "cp.async.commit": r"cp\.async\.commit_group",
    "cp.async.wait": r"cp\.async\.wait_group",
}
# What a warp does alone, beside arithmetic.
_ACCESSES = r"(ld|st)\.(global|shared)(\.v[24])?\.(b(8|16|32|64)|[uf](16|32|64)|s(32|64))|ld\.param\.[bus](32|64)"
_MATRICES = r"(ld|st)matrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16"
_PRODUCTS = r"mma\.sync\.aligned\.m16n8k(16\.row\.col\.f32\.(f16\.f16|bf16\.bf16)|8\.row\.col\.f32\.tf32\.tf32)\.f32"


def event_name(opcode: str) -> str | None:
    """Which event an instruction is; None of what a warp does alone."""
    return next((name for name, pattern in EVENTS.items() if re.fullmatch(pattern, opcode)), None)


@dataclass
class Piece:
    """Instructions of which none is an event, the registers that they touch, and of those the ones not merely set."""

    run: Callable[[Any], None]
    registers: frozenset[int]
    computed: frozenset[int]


@dataclass
class Event:
    """An instruction for the machine, with its registers' numbers in the place of their names."""

    name: str
    instruction: Instruction
    guard: Callable[[Any], Any]
    operands: list[Any]


@dataclass
class Translation:
    steps: list[Piece | Event] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # of steps
    tables: dict[str, list[str]] = field(default_factory=dict)  # of labels
    widths: list[int] = field(default_factory=list)  # of registers, in bits


class Translator:
    """Of one program."""

    def __init__(self, program: Program, parameters: dict[str, int]) -> None:
        self.program, self.parameters = program, parameters
        self.numbers: dict[str, int] = {}
        self.widths: list[int] = []
        self.constants: dict[str, Any] = {"where": np.where, "multiplied": multiplied}

    def translated(self) -> Translation:
        """The program in pieces and events."""
        found = Translation(widths=self.widths, tables=self.program.tables)
        starts: dict[int, list[str]] = {}
        for label, index in self.program.labels.items():
            starts.setdefault(index, []).append(label)
        pending: list[Instruction] = []

        def finish() -> None:
            if pending:
                found.steps.append(self._piece(pending))
                pending.clear()

        for index, instruction in enumerate(self.program.instructions):
            if index in starts:
                finish()
                found.labels.update(dict.fromkeys(starts[index], len(found.steps)))
            name = event_name(instruction.opcode)
            if name is None:
                pending.append(instruction)
            else:
                finish()
                found.steps.append(self._event(name, instruction))
        finish()
        return found

    # Registers and constants

    def register(self, name: str) -> int:
        if name not in self.numbers:
            letters = name if "@" in name else name.rstrip("0123456789")
            self.widths.append(self.program.widths[letters])
            self.numbers[name] = len(self.numbers)
        return self.numbers[name]

    def _is_register(self, operand: str) -> bool:
        letters = operand if "@" in operand else operand.rstrip("0123456789")
        return letters in self.program.widths

    def _constant(self, value: Any, bits: int) -> str:
        name = f"c{value:x}_{bits}".replace("-", "_")
        self.constants[name] = np.full(LANES, value & ((1 << bits) - 1), _DTYPES[bits])
        return name

    def value(self, operand: str, bits: int) -> str:
        """Python's words for an operand that is read."""
        if self._is_register(operand):
            return f"r[{self.register(operand)}]"
        if operand.startswith("%"):
            return f"w.special[{operand!r}]"
        if operand == "global_smem":
            return self._constant(SHARED_BASE, bits)
        if operand in self.parameters:
            return self._constant(self.parameters[operand], bits)
        if operand.startswith(("0f", "0F", "0d", "0D")):
            return self._constant(int(operand[2:], 16), bits)
        if bits == 1:
            return self._constant(int(int(operand, 0) != 0), 1)
        return self._constant(int(operand.rstrip("U"), 0), bits)

    def address(self, operand: str) -> tuple[str, int]:
        """Of ``[%rd1 + 4]`` the words for the register, and the offset."""
        base, offset = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\d+)\s*)?\]", operand).groups()  # type: ignore[union-attr]
        return self.value(base, 64 if base.startswith("%rd") else 32), int(offset or 0)

    def members(self, operand: str) -> list[str]:
        """Of ``{%r1, %r2}`` the names."""
        return [name.strip() for name in operand.strip("{} ").split(",")]

    def guard(self, instruction: Instruction) -> str:
        if instruction.guard is None:
            return "w.all_lanes"
        return f"{'~' if instruction.negated else ''}r[{self.register(instruction.guard)}]"

    # Pieces

    def _piece(self, instructions: list[Instruction]) -> Piece:
        lines: list[str] = []
        touched: set[int] = set()
        computed: set[int] = set()
        for instruction in instructions:
            targets, expression = self._assignment(instruction)
            names = re.findall(r"[%\w]+", " ".join(instruction.operands) + f" {instruction.guard}")
            registers = {self.register(name) for name in names if self._is_register(name)}
            touched |= registers
            if instruction.parts[0] != "mov":  # which LLVM may move behind a wgmma.fence
                computed |= registers
            left = ", ".join(f"r[{target}]" for target in targets)
            if instruction.guard is not None and targets and instruction.parts[0] != "ld":
                kept = self.guard(instruction)
                assert len(targets) == 1, instruction
                expression = f"where({kept}, {expression}, {left})"
            lines.append(f"    {left} = {expression}" if targets else f"    {expression}")
        source = "def piece(w):\n    r = w.registers\n" + "\n".join(lines)
        scope = dict(self.constants)
        exec(compile(source, "<ptx>", "exec"), scope)
        return Piece(scope["piece"], frozenset(touched), frozenset(computed))

    def _function(self, opcode: str) -> str:
        name = "f_" + re.sub(r"\W", "_", opcode)
        if name not in self.constants:
            self.constants[name] = function_of(opcode)
        return name

    def _assignment(self, instruction: Instruction) -> tuple[list[int], str]:
        """The registers that change, and the words for what they become."""
        name, parts, operands = instruction.parts[0], instruction.parts, instruction.operands
        opcode, guarded = instruction.opcode, instruction.guard is not None
        if re.fullmatch(_ACCESSES, opcode) and not (guarded and parts[1] == "param"):
            return self._access(instruction)
        if guarded and name in ("ld", "ldmatrix", "stmatrix", "mma", "elect", "shfl"):
            raise NotImplementedError(instruction.text)
        if re.fullmatch(_MATRICES, opcode):
            return self._matrices(instruction)
        if re.fullmatch(_PRODUCTS, opcode):
            a, b, c = ([self.value(member, 32) for member in self.members(operand)] for operand in operands[1:])
            targets = [self.register(member) for member in self.members(operands[0])]
            words = ", ".join(f"[{', '.join(operand)}]" for operand in (a, b, c))
            return targets, f"multiplied({parts[3]!r}, {parts[7]!r}, {words})"
        if opcode == "elect.sync" and operands[1] == "-1":
            leader, elected = map(self.register, operands[0].split("|"))
            return [leader, elected], "(w.special['%tid.z'], w.first_lane)"  # which is lane 0
        if re.fullmatch(r"shfl\.sync\.(bfly|idx)\.b32", opcode) and "|" not in operands[0] and operands[4] == "-1":
            x, other, segment = (self.value(operand, 32) for operand in operands[1:4])
            return [self.register(operands[0])], f"w.shuffle({parts[2]!r}, {x}, {other}, {segment})"
        if name == "mov" and operands[0].startswith("{"):
            members = self.members(operands[0])
            source = self.value(operands[1], bits_of(parts[1]))
            return [self.register(member) for member in members], f"w.unpacked({source}, {len(members)})"
        if name == "mov" and operands[1].startswith("{"):
            members = self.members(operands[1])
            words = ", ".join(self.value(member, bits_of(parts[1]) // len(members)) for member in members)
            return [self.register(operands[0])], f"w.packed([{words}])"
        function = self._function(opcode)
        targets = [self.register(target) for target in operands[0].split("|")]
        widths = self._bits(instruction)
        if len(operands) - 1 > len(widths):
            raise NotImplementedError(instruction.text)
        words = ", ".join(map(self.value, operands[1:], widths))
        return targets, f"{function}({words})"

    def _matrices(self, instruction: Instruction) -> tuple[list[int], str]:
        loads, transposed = instruction.parts[0] == "ldmatrix", "trans" in instruction.parts
        members, memory = instruction.operands if loads else instruction.operands[::-1]
        address, offset = self.address(memory)
        if not loads:
            words = ", ".join(self.value(member, 32) for member in self.members(members))
            return [], f"w.store_matrix({address}, {offset}, [{words}], {transposed})"
        targets = [self.register(member) for member in self.members(members)]
        one = "[0]" if len(targets) == 1 else ""
        return targets, f"w.load_matrix({address}, {offset}, {len(targets)}, {transposed}){one}"

    def _bits(self, instruction: Instruction) -> list[int]:
        """Of an instruction's operands, where they are constants."""
        name, parts = instruction.parts[0], instruction.parts
        bits = bits_of(parts[-1])
        if name in ("shl", "shr"):
            return [bits, 32]
        if name == "selp":
            return [bits, bits, 1]
        if name == "bfe":
            return [bits, 32, 32]
        if name == "setp":
            return [bits, bits]
        return [bits, bits, 2 * bits if "wide" in parts else bits]

    def _access(self, instruction: Instruction) -> tuple[list[int], str]:
        parts, operands = instruction.parts, instruction.operands
        store = parts[0] == "st"
        values, memory = operands if not store else operands[::-1]
        members = self.members(values)
        bits = bits_of(parts[-1])
        space = parts[1]
        if space == "param":
            return [self.register(values)], self.value(memory.strip("[] "), bits)
        address, offset = self.address(memory)
        kept = self.guard(instruction)
        if store:
            words = ", ".join(self.value(member, max(bits, 16)) for member in members)
            return [], f"w.store({space!r}, {address}, {offset}, {bits}, [{words}], {kept})"
        targets = [self.register(member) for member in members]
        old = ", ".join(f"r[{target}]" for target in targets)
        one = "[0]" if len(targets) == 1 else ""
        return targets, f"w.load({space!r}, {address}, {offset}, {bits}, [{old}], {kept}){one}"

    # Events

    def _event(self, name: str, instruction: Instruction) -> Event:
        operands: list[Any] = []
        for operand in instruction.operands:
            if operand.startswith("["):
                inner = re.fullmatch(r"\[([^,{]*)(?:,\s*\{(.*)\})?\]", operand)
                assert inner is not None, instruction
                words, offset = self.address(f"[{inner[1].strip()}]")
                names = [name.strip() for name in (inner[2] or "").split(",") if name]
                coordinates = [self._reader(self.value(name, 32)) for name in names]
                operands.append((self._reader(words), offset, coordinates))
            elif operand.startswith("{"):
                operands.append([self.register(member) for member in self.members(operand)])
            elif operand == "_" or operand in self.program.tables or operand in self.program.labels:
                operands.append(operand)
            elif self._is_register(operand):
                operands.append(self._reader(f"r[{self.register(operand)}]"))
            else:
                operands.append(int(operand, 0))
        if name == "mbarrier.try_wait":
            operands[0] = self.register(instruction.operands[0])
        return Event(name, instruction, self._reader(self.guard(instruction)), operands)

    def _reader(self, words: str) -> Callable[[Any], Any]:
        return eval(f"lambda w: {words.replace('r[', 'w.registers[')}", dict(self.constants))
