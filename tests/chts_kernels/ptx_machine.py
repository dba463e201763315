"""A PTX machine on the CPU: all threads of one block in lockstep, numpy over threads. For tests of kernels where there is no device.

It knows what the Ampere-class kernels and the elementwise ones consist of: integer and float32 arithmetic, branches that all threads take
alike, cp.async, ldmatrix, movmatrix, shuffles, mma.sync m16n8k16 and mma.sp m16n8k32 with 16-bit operands. What it looks for, besides
results: reads and writes outside of what was allocated or off the boundary that vectors need, fragments read before their copy was waited
for (`late` copies) or after a later one overwrote them (early ones), and bank conflicts of ldmatrix and of 16-byte copies.
"""

from __future__ import annotations

import re

import numpy as np

M32 = 0xFFFFFFFF


def s32(x):
    return ((x & M32) ^ 0x80000000) - 0x80000000


def f32(x):
    return (x & M32).astype(np.uint32).view(np.float32)


def bits(x):
    return np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.int64)


class Memory:
    """Byte-addressed arrays with gaps between them; an access outside of one raises."""

    def __init__(self) -> None:
        self.arrays: list[tuple[int, np.ndarray]] = []
        self.next = 1 << 32

    def put(self, array: np.ndarray) -> int:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()
        at, self.next = self.next, self.next + -(-len(data) // 4096) * 4096 + 65536
        self.arrays.append((at, data))
        return at

    def find(self, address: int, count: int) -> np.ndarray:
        for at, data in self.arrays:
            if at <= address and address + count <= at + len(data):
                return data[address - at : address - at + count]
        raise AssertionError(f"access of {count} bytes at {address:#x}, outside of every array")


class Machine:
    def __init__(self, ptx: str, name: str, shared_bytes: int, *, late: bool, dtype: str = "bf16") -> None:
        body = ptx[ptx.index("{", ptx.index(f".entry {name}(")) + 1 :]
        body = re.sub(r"//[^\n]*", "", body)
        self.name, self.late, self.dtype = name, late, dtype
        self.threads = int(re.search(r"\.reqntid (\d+)", ptx).group(1))
        self.shared_bytes = shared_bytes
        self.program, self.labels = [], {}
        for statement in re.split(r";|\n", body):
            text = statement.strip()
            while True:
                if text[:1] in ("{", "}"):
                    text = text[1:].strip()
                elif found := re.match(r"^(\$?\w+):(?!:)\s*(.*)$", text):
                    self.labels[found.group(1)] = len(self.program)
                    text = found.group(2).strip()
                else:
                    break
            if text and not text.startswith("."):
                self.program.append(self._parse(text))

    @staticmethod
    def _parse(text: str):
        guard = re.match(r"^@(!?)([%\w]+)\s+(.*)$", text)
        sense, predicate = True, None
        if guard:
            sense, predicate, text = not guard.group(1), guard.group(2), guard.group(3)
        operation, _, rest = text.partition(" ")
        arguments = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest.strip())]
        arguments = [[p.strip() for p in a[1:-1].split(",")] if a.startswith("{") else a for a in arguments]
        return predicate, sense, operation.strip(), arguments

    # --- operands
    def value(self, text: str):
        found = self.registers.get(text)
        if found is not None:
            return found
        if text.startswith("0f"):
            return np.full(self.threads, int(text[2:], 16), np.int64)
        number = int(text, 0)
        return np.full(self.threads, number - (1 << 64) if number >> 63 == 1 else number, np.int64)

    def address(self, text: str):
        base, _, offset = text[1:-1].partition("+")
        return self.value(base.strip()) + (int(offset) if offset else 0)

    def set(self, name: str, value, mask) -> None:
        value = np.broadcast_to(np.asarray(value), self.threads)
        if mask.all():
            self.registers[name] = value.copy()
        else:
            before = self.registers.get(name, np.zeros(self.threads, value.dtype))
            self.registers[name] = np.where(mask, value, before)

    # --- running
    def run(self, memory: Memory, parameters: list[int], block: int, blocks: int, limit: int = 400_000) -> None:
        threads = self.threads
        self.memory = memory
        self.shared = np.full(self.shared_bytes, 0xFF, np.uint8)
        tid = np.arange(threads, dtype=np.int64)
        everyone = np.ones(threads, bool)
        self.registers = {"%tid.x": tid, "global_smem": np.zeros(threads, np.int64), "%ctaid.x": np.full(threads, block, np.int64),
                          "%nctaid.x": np.full(threads, blocks, np.int64)}  # fmt: skip
        self.parameters = parameters
        self.groups: list[list] = []
        self.open: list = []
        at = 0
        for _ in range(limit):
            predicate, sense, operation, arguments = self.program[at]
            at += 1
            mask = everyone
            if predicate is not None:
                mask = self.registers[predicate].astype(bool)
                mask = mask if sense else ~mask
            if operation in ("bra", "bra.uni"):
                assert mask.all() or not mask.any(), "threads part ways"
                if mask.all():
                    at = self.labels[arguments[0]]
            elif operation == "ret":
                return
            else:
                self.execute(operation, arguments, mask)
        raise AssertionError("the kernel does not end")

    def execute(self, operation: str, a: list, mask) -> None:
        parts = operation.split(".")
        kind = parts[0]
        if parts[-1] == "f32" and kind in ("add", "sub", "mul", "min", "max"):
            self.do_float(kind, a, mask)
            return
        handler = getattr(self, f"do_{kind}", None)
        if handler is not None:
            handler(operation, parts, a, mask)
            return
        wide = parts[-1] in ("s64", "u64", "b64")
        signed, unsigned = parts[-1] in ("s32", "s64"), parts[-1] == "u64"
        values = [self.value(x) for x in a[1:]]
        if not wide and kind not in ("selp",) and parts[-1] != "pred":
            values = [s32(v) if signed else v & M32 for v in values]
        if "wide" in parts:
            values = [s32(v) if signed else v & M32 for v in values[:2]] + [self.value(x) for x in a[3:]]
        result = {
            "add": lambda: values[0] + values[1],
            "sub": lambda: values[0] - values[1],
            "mul": lambda: values[0] * values[1],
            "mad": lambda: values[0] * values[1] + values[2],
            "and": lambda: values[0] & values[1],
            "or": lambda: values[0] | values[1],
            "xor": lambda: values[0] ^ values[1],
            "not": lambda: ~values[0],
            "shl": lambda: values[0] << values[1],
            "shr": lambda: (values[0].view(np.uint64) >> values[1].view(np.uint64)).view(np.int64) if unsigned else values[0] >> values[1],
            "min": lambda: np.minimum(values[0], values[1]),
            "max": lambda: np.maximum(values[0], values[1]),
            "div": lambda: np.trunc(values[0] / values[1]).astype(np.int64),
            "rem": lambda: np.fmod(values[0], values[1]),
            "neg": lambda: -values[0],
            "selp": lambda: np.where(values[2].astype(bool), values[0], values[1]),
            "bfe": lambda: values[0] >> values[1] & (1 << values[2]) - 1,
        }[kind]()
        if kind == "bfe" and signed:
            sign = 1 << values[2] - 1
            result = (result ^ sign) - sign
        if parts[-1].endswith("16"):
            result = result & 0xFFFF
        if parts[-1] != "pred" and not wide and "wide" not in parts:
            result = result & M32
        elif parts[-1] == "pred":
            result = result.astype(bool)
        self.set(a[0], result, mask)

    def do_mov(self, operation, parts, a, mask):
        """Also a register of two, or of its two halves."""
        if isinstance(a[0], list):
            half = int(parts[-1][1:]) // 2
            whole = self.value(a[1])
            for i, name in enumerate(a[0]):
                self.set(name, whole >> half * i & (1 << half) - 1, mask)
        elif isinstance(a[1], list):
            half = int(parts[-1][1:]) // 2
            low, high = (self.value(name) & (1 << half) - 1 for name in a[1])
            self.set(a[0], low | high << half, mask)
        else:
            self.set(a[0], self.value(a[1]), mask)

    def do_setp(self, operation, parts, a, mask):
        left, right = (self.value(x) for x in a[1:3])
        if parts[-1] == "f32":
            left, right = f32(left), f32(right)
        elif parts[-1] == "s32":
            left, right = s32(left), s32(right)
        elif parts[-1] in ("u32", "b32"):
            left, right = left & M32, right & M32
        result = {"gt": left > right, "lt": left < right, "ge": left >= right, "le": left <= right, "eq": left == right,
                  "ne": left != right, "neu": left != right}[parts[1]]  # fmt: skip
        if "and" in parts:
            result = result & self.registers[a[3]].astype(bool)
        self.set(a[0], result, mask)

    def do_float(self, kind, a, mask):
        left, right = (f32(self.value(x)) for x in a[1:3])
        with np.errstate(invalid="ignore", over="ignore"):
            # The smaller (larger) of a number and a NaN is the number.
            result = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.fmin, "max": np.fmax}[kind](left, right)
        self.set(a[0], bits(result), mask)

    def do_redux(self, operation, parts, a, mask):
        assert operation == "redux.sync.add.s32" and mask.all(), operation
        total = s32(self.value(a[1])).reshape(-1, 32).sum(1)
        self.set(a[0], np.repeat(total, 32) & M32, mask)

    def do_cvt(self, operation, parts, a, mask):
        if parts[1] == "rn" and parts[2] in ("bf16x2", "f16x2"):
            high, low = (self.round16(f32(self.value(x))) for x in a[1:])
            self.set(a[0], high << 16 | low, mask)
        elif parts[1] == "rn":
            self.set(a[0], self.round16(f32(self.value(a[1]))), mask)
        elif parts[1] == "f32":
            self.set(a[0], bits(self.float16(self.value(a[1]))), mask)
        elif operation in ("cvt.s64.s32",):
            self.set(a[0], s32(self.value(a[1])), mask)
        else:
            assert operation in ("cvt.u64.u32", "cvt.u32.u64", "cvt.u16.u32", "cvt.u32.u16"), operation
            self.set(a[0], self.value(a[1]) & (0xFFFF if "u16" in parts else M32), mask)

    def round16(self, x):
        if self.dtype == "f16":
            with np.errstate(over="ignore"):
                return x.astype(np.float16).view(np.uint16).astype(np.int64)
        word = np.ascontiguousarray(x).view(np.uint32).astype(np.int64)
        rounded = (word + 0x7FFF + (word >> 16 & 1)) >> 16 & 0xFFFF
        return np.where(np.isnan(x), 0x7FFF, rounded)

    def float16(self, x):
        half = (x & 0xFFFF).astype(np.uint16)
        if self.dtype == "f16":
            return half.view(np.float16).astype(np.float32)
        return (half.astype(np.uint32) << 16).view(np.float32)

    # --- memory
    def do_ld(self, operation, parts, a, mask):
        if parts[1] == "param":
            index = int(re.search(r"param_(\d+)", a[1]).group(1))
            self.set(a[0], np.full(self.threads, self.parameters[index], np.int64), mask)
            return
        size = int(parts[-1][1:]) // 8
        names = a[0] if isinstance(a[0], list) else [a[0]]
        where = self.address(a[1])
        words = np.zeros((len(names), self.threads), np.int64)
        assert not (where[mask] % (size * len(names))).any(), f"off its boundary: {operation}"
        for t in np.flatnonzero(mask):
            data = self.bytes(parts[1], int(where[t]), size * len(names))
            for i in range(len(names)):
                words[i, t] = int.from_bytes(data[i * size : (i + 1) * size].tobytes(), "little", signed=size == 8)
        for i, name in enumerate(names):
            self.set(name, words[i], mask)

    def do_st(self, operation, parts, a, mask):
        size = int(parts[-1][1:]) // 8
        names = a[1] if isinstance(a[1], list) else [a[1]]
        where, values = self.address(a[0]), [self.value(name) for name in names]
        assert not (where[mask] % (size * len(names))).any(), f"off its boundary: {operation}"
        for t in np.flatnonzero(mask):
            data = b"".join((int(v[t]) & (1 << 8 * size) - 1).to_bytes(size, "little") for v in values)
            self.bytes(parts[1], int(where[t]), len(data))[:] = np.frombuffer(data, np.uint8)
        if parts[1] == "shared" and size == 4 and mask.all():
            self.check_banks(where, 32, 4, operation)

    def bytes(self, space: str, address: int, count: int) -> np.ndarray:
        if space == "global":
            return self.memory.find(address, count)
        assert address >= 0 and address + count <= self.shared_bytes, f"shared access at {address}"
        return self.shared[address : address + count]

    def check_banks(self, where, lanes: int, width: int, what: str) -> None:
        """Every group of `lanes` accesses of `width` bytes touches each bank once (the same address twice is no conflict)."""
        for first in range(0, self.threads, lanes):
            words = {int(x) + 4 * i for x in where[first : first + lanes] for i in range(width // 4)}
            assert len({w // 4 % 32 for w in words}) == len(words), f"bank conflict: {what}"

    def do_cp(self, operation, parts, a, mask):
        if parts[2] == "commit_group":
            self.groups.append(self.open)
            self.open = []
        elif parts[2] == "wait_group":
            while len(self.groups) > int(a[0]):
                self.land(self.groups.pop(0))
        else:
            to, source = self.address(a[0]), self.address(a[1])
            size = int(a[2])
            count = np.full(self.threads, size)
            if len(a) > 3:  # bytes to read, or a predicate: none of them
                given = self.value(a[3])
                count = np.where(given, 0, size) if given.dtype == bool else given
            copies = []
            for t in np.flatnonzero(mask):
                data = np.zeros(size, np.uint8)
                n = int(s32(count[t : t + 1])[0])
                assert 0 <= n <= size and int(source[t]) % size == 0 and int(to[t]) % size == 0
                if n:
                    data[:n] = self.memory.find(int(source[t]), n)
                copies.append((int(to[t]), data))
            if mask.all():
                self.check_banks(to, 8, 16, operation)
            if self.late:
                self.open += copies
            else:
                self.land(copies)

    def land(self, copies) -> None:
        for to, data in copies:
            self.shared[to : to + len(data)] = data

    def do_bar(self, operation, parts, a, mask):
        pass

    # --- fragments
    def do_ldmatrix(self, operation, parts, a, mask):
        where = self.address(a[1])
        if "x4" not in parts:  # Triton's own, of zeros that nobody looks at
            for name in a[0] if isinstance(a[0], list) else [a[0]]:
                self.set(name, np.zeros(self.threads, np.int64), mask)
            return
        self.check_banks(where, 8, 16, operation)
        assert (where % 16 == 0).all() and (where >= 0).all() and (where + 16 <= self.shared_bytes).all()
        rows = self.shared[where[:, None] + np.arange(16)].reshape(-1, 4, 8, 16).view(np.uint16)  # [warp, matrix, row, column]
        if "trans" in parts:
            rows = rows.swapaxes(-1, -2)
        pairs = np.ascontiguousarray(rows).view(np.uint32).astype(np.int64)  # [warp, matrix, row g, pair q]
        for i, name in enumerate(a[0]):
            self.set(name, pairs[:, i].reshape(-1), mask)

    def do_movmatrix(self, operation, parts, a, mask):
        halves = self.value(a[1]).astype(np.uint32).view(np.uint16).reshape(-1, 8, 8).swapaxes(-1, -2)
        self.set(a[0], np.ascontiguousarray(halves).view(np.uint32).astype(np.int64).reshape(-1), mask)

    def do_shfl(self, operation, parts, a, mask):
        lane = np.arange(self.threads) ^ int(a[2])
        self.set(a[0], self.value(a[1])[lane], mask)

    def do_prmt(self, operation, parts, a, mask):
        pool = (self.value(a[1]) & M32).astype(np.uint64) | (self.value(a[2]) & M32).astype(np.uint64) << np.uint64(32)
        control, result = self.value(a[3]), np.zeros(self.threads, np.int64)
        for i in range(4):
            choice = (control >> 4 * i & 7).astype(np.uint64)
            result |= ((pool >> (choice * np.uint64(8))) & np.uint64(255)).astype(np.int64) << 8 * i
        self.set(a[0], result, mask)

    def halves(self, names):
        """[warp, g, q, register, 2] float32."""
        words = np.stack([self.value(name) & M32 for name in names], -1)
        return np.stack([self.float16(words & 0xFFFF), self.float16(words >> 16)], -1).reshape(-1, 8, 4, len(names), 2)

    def do_mma(self, operation, parts, a, mask):
        sparse = "sp::ordered_metadata" in operation
        acc = np.stack([f32(self.value(n)) for n in a[3]], -1).reshape(-1, 8, 4, 2, 2)  # [warp, g, q, half, column]
        d = acc.transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8)
        left = self.halves(a[1]).reshape(-1, 8, 4, 2, 2, 2)  # [warp, g, q, k half, row half, 2]
        left = left.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)
        right = self.halves(a[2])  # [warp, n = g, q, k eighth, 2]
        right = right.transpose(0, 3, 2, 4, 1).reshape(len(right), -1, 8)
        if sparse:
            word = self.value(a[4]).reshape(-1, 8, 4)[:, :, 2 * int(a[5], 0) : 2 * int(a[5], 0) + 2]  # [warp, g, k16]
            half = np.stack([word & 0xFFFF, word >> 16 & 0xFFFF], 1).reshape(-1, 16, 2)  # row g, then g + 8
            nibbles = (half[..., None] >> np.arange(0, 16, 4) & 15).reshape(-1, 16, 8)  # groups of four columns
            assert ((nibbles & 3) < (nibbles >> 2)).all(), "metadata out of order"
            dense = np.zeros((len(left), 16, 8, 4), np.float32)
            kept = left.reshape(-1, 16, 8, 2)
            np.put_along_axis(dense, np.stack([nibbles & 3, nibbles >> 2], -1), kept, -1)
            chosen = np.zeros(dense.shape, bool)
            np.put_along_axis(chosen, np.stack([nibbles & 3, nibbles >> 2], -1), True, -1)
            dense, chosen = dense.reshape(-1, 16, 32), chosen.reshape(-1, 16, 32)
            with np.errstate(invalid="ignore", over="ignore"):
                products = np.where(chosen[..., None], dense[..., None] * right[:, None], 0)  # what is not chosen is not multiplied
                d = d + products.sum(2)
        else:
            with np.errstate(invalid="ignore", over="ignore"):
                d = d + np.matmul(left, right)
        out = d.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)
        for i, name in enumerate(a[0]):
            self.set(name, bits(out[:, i]), mask)
