"""The PTX that writes the selectors, interpreted thread by thread on the CPU, against their definition.

An epilogue with wrong selectors compiles and runs; this test needs no device to see it.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from chts_kernels.format import random_ids
from chts_kernels.ops.weight_grad.sm90_launch import selector_table

pytest.importorskip("triton")
WORD = 0xFFFFFFFF
IDS_AT, TABLE_AT = 1 << 40, 1 << 50


def source(monkeypatch, mb, bn):
    from chts_kernels.ops.weight_grad import sm90_links

    kept = []
    monkeypatch.setattr(sm90_links, "asm_scalar", lambda semantic, asm, constraints, args=(): kept.append(asm))
    sm90_links.write_selectors(0, 0, 0, 0, 0, 0, 0, mb, bn, _semantic=object())
    return kept[0]


def prmt(a, b, control):
    pool = a | b << 32
    return sum((pool >> 8 * (control >> 4 * i & 7) & 255) << 8 * i for i in range(4))


BINARY = {
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "add": lambda a, b: a + b, "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b, "div": lambda a, b: a // b, "min": min, "shl": lambda a, b: a << b, "shr": lambda a, b: a >> b,
}  # fmt: skip


def interpret(asm, operands, ids, table, tid, shared):
    """One thread through the few instructions that write_selectors is made of."""
    program = []
    for statement in re.split(r";|\n", asm.strip()[1:-1]):
        label = re.match(r"^\s*(\w+):\s*(.*)$", statement)
        if label:
            program.append((label.group(1), ""))
            statement = label.group(2)
        if statement.strip() and not statement.strip().startswith(".reg"):
            program.append(("", statement.strip()))
    labels = {name: i for i, (name, _) in enumerate(program) if name}
    registers = {"%tid.x": tid, "global_smem": 0}

    def value(text):
        if text.startswith("$"):
            return operands[int(text[1:])]
        return registers[text] if text in registers else int(text, 0)

    at = 0
    while at < len(program):
        statement = program[at][1]
        at += 1
        guard = re.match(r"^@(\w+)\s+(.*)$", statement)
        if guard:
            if not registers[guard.group(1)]:
                continue
            statement = guard.group(2)
        if not statement or statement.startswith("bar."):
            continue
        operation, rest = statement.split(None, 1)
        names = [name for name in re.split(r"[,\s{}\[\]+]+", rest) if name]
        if operation == "bra":
            at = labels[names[0]]
        elif operation.startswith("st.shared"):
            address = registers[names[0]] + (int(names[1]) if len(names) == 3 else 0)
            shared[address] = registers[names[-1]]
        elif operation == "ld.global.nc.u8":
            registers[names[0]] = int(ids[registers[names[1]] - IDS_AT])
        elif operation.startswith("ld.global.nc.v2"):
            word = int(table[(registers[names[2]] - TABLE_AT) // 8])
            registers[names[0]], registers[names[1]] = word & WORD, word >> 32 & WORD
        else:
            kind, (target, *sources) = operation.split(".")[0], names
            inputs = [value(name) for name in sources]
            if kind in ("mov", "cvt"):
                result = inputs[0]
            elif kind == "setp":
                assert operation == "setp.lt.u32"
                result = int(inputs[0] < inputs[1])
            elif kind == "mad":
                result = inputs[0] * inputs[1] + inputs[2]
            elif kind == "bfe":
                result = inputs[0] >> inputs[1] & (1 << inputs[2]) - 1
            elif kind == "prmt":
                result = prmt(*inputs)
            else:
                result = BINARY[kind](*inputs)
            wide = "64" in operation or ".wide" in operation
            registers[target] = result if wide else result & WORD


@pytest.mark.parametrize(("mb", "bn", "shape", "corner", "n"), [
    (1, 256, (512, 512), (128, 256), 2), (1, 256, (1096, 520), (1024, 512), 2), (2, 128, (1096, 516), (1024, 512), 2),
    (2, 128, (512, 512), (256, 128), 1), (1, 192, (384, 384), (128, 192), 2), (1, 256, (8, 12), (0, 0), 2),
])  # fmt: skip
def test_selectors_lie_where_their_threads_read_them(monkeypatch, mb, bn, shape, corner, n):
    asm, ids = source(monkeypatch, mb, bn), random_ids(*shape, n, seed=1)
    table, base = selector_table(n).astype(np.uint64), 4096
    operands = {1: base, 2: IDS_AT, 3: TABLE_AT, 4: corner[0], 5: corner[1], 6: shape[0] // 4, 7: shape[1] // 4}
    shared: dict[int, int] = {}
    for tid in range(256 + 32, 256 + 128):  # warps 1-3 of the third warpgroup
        interpret(asm, operands, ids.numpy().reshape(-1), table, tid, shared)
    assert len(shared) == mb * 256 * bn // 16
    for m in range(mb):
        for thread in range(256):
            lane, slab = thread % 32, thread // 128 * mb * 4 + m * 4 + thread // 32 % 4
            parity, upper = lane & 1, lane >> 1 & 1
            for jj in range(bn // 16):
                word = shared[base + ((m * (bn // 64) + jj // 4) * 256 + thread) * 16 + jj % 4 * 4]
                for h in range(2):
                    row, group = corner[0] + slab * 16 + 8 * h + lane // 4, corner[1] // 4 + 4 * jj + 2 * parity + upper
                    pattern = int(ids[min(row // 4, shape[0] // 4 - 1), min(group, shape[1] // 4 - 1)])
                    expected = int(table[pattern]) >> 16 * (row % 4) & 0xFFFF ^ 0x4444 * parity
                    assert word >> 16 * h & 0xFFFF == expected
