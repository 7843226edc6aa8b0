"""The few pickle opcodes that torch.save writes, read without the pickle module: data out, no code in.

A machine of one stack. Globals are a closed list of names, each with a meaning of its own here; nothing is looked
up or imported. The results are dicts, lists, tuples, numbers, texts, and `View`s, which say which bytes of which
storage a tensor is. Any other opcode or name is an InputError, as is every malformed stream.
"""

import dataclasses
import struct

from jaxsub import errors

MAX_OPCODES = 5_000_000  # seconds; a tensor takes about 30
MAX_STACK = 1_000_000
MAX_NUMBER = 255  # bytes of an integer
MAX_DIMS = 32

_STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip
_DTYPES = {name: name for name in (*_STORAGES.values(), "uint16", "uint32", "uint64")} | {
    name: name for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
}
_DTYPES |= {"float": "float32", "double": "float64", "half": "float16", "long": "int64", "int": "int32"}


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """An allowed name: what it is ('storage', 'dtype', 'call') and its value here."""

    kind: str
    value: str | None


GLOBALS = (
    {("torch", name): Global("storage", dtype) for name, dtype in _STORAGES.items()}
    | {("torch", name): Global("dtype", dtype) for name, dtype in _DTYPES.items()}
    | {("torch.storage", "UntypedStorage"): Global("storage", None)}
    | {
        ("torch._utils", n): Global("call", n)
        for n in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
    }
    | {("torch", "Size"): Global("call", "Size"), ("collections", "OrderedDict"): Global("call", "OrderedDict")}
)


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """A record of the archive: `count` entries of `dtype` (bytes if None)."""

    key: str
    dtype: str | None
    count: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tensor: entries of a storage, from `offset` on, in steps of `stride`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple
    stride: tuple


class OrderedDict(dict):
    """Stands for collections.OrderedDict: the only object that may be given a state, which is dropped."""


class Fault(Exception):
    """What is wrong with a stream; `read` turns it into an InputError."""


def read(data, path):
    """The object in the pickle stream `data`.

    Raises:
        InputError: an opcode or a global that state dicts do not need, a malformed stream, or a limit.
    """
    machine = _Machine(data)
    try:
        return machine.run()
    except Fault as fault:
        reason = f"{fault} (byte {machine.at} of data.pkl)"
    except (struct.error, UnicodeDecodeError):
        reason = f"the pickle stream is cut short or damaged at byte {machine.at}"
    hint = "save model.state_dict() alone, or re-save the weights as safetensors"
    raise errors.InputError(path, reason, hint=hint, rule="H9") from None


class _Machine:
    def __init__(self, data):
        self.data, self.at = data, 0
        self.stack, self.marks, self.memo = [], [], {}

    def run(self):
        for _ in range(MAX_OPCODES):
            opcode = self.take(1)[0]
            if opcode == ord("."):
                return self._result()
            action = _ACTIONS.get(opcode)
            if action is None:
                raise Fault(f"the opcode {opcode:#04x} is not one that torch.save writes for weights")
            action(self)
            if len(self.stack) > MAX_STACK or len(self.marks) > MAX_STACK:
                raise Fault(f"more than {MAX_STACK} objects wait on the stack")
        raise Fault(f"more than {MAX_OPCODES} opcodes")

    def _result(self):
        if len(self.stack) != 1 or self.marks:
            raise Fault("the stream ends with an unbalanced stack")
        if self.at != len(self.data):
            raise Fault("the stream goes on after its end")
        return self.stack[0]

    def take(self, count):
        """The next bytes; checked before anything is allocated."""
        end = self.at + count
        if end > len(self.data):
            raise Fault(f"the stream announces {count} bytes and has {len(self.data) - self.at}")
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def number(self, form):
        """The next little-endian number of struct format `form`."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def line(self):
        end = self.data.find(b"\n", self.at, self.at + 256)
        if end < 0:
            raise Fault("a name does not end")
        text = self.data[self.at : end].decode("utf-8")
        self.at = end + 1
        return text

    def push(self, value):
        self.stack.append(value)

    def pop(self):
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Fault("the stack is empty")
        return self.stack.pop()

    def pop_mark(self):
        if not self.marks:
            raise Fault("there is no mark on the stack")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kinds, what):
        if len(self.stack) <= (self.marks[-1] if self.marks else 0) or not isinstance(self.stack[-1], kinds):
            raise Fault(f"{what} is applied to something else")
        return self.stack[-1]


def _set_items(machine, items):
    target = machine.top(dict, "SETITEM")
    if len(items) % 2:
        raise Fault("a key has no value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, (str, int)):
            raise Fault("a key is neither text nor a number")
        if key in target:
            raise Fault(f"the key {errors.quote(key)!r} appears twice")
        target[key] = value


def _append(machine, items):
    machine.top(list, "APPEND").extend(items)


def _get(machine, index):
    if index not in machine.memo:
        raise Fault(f"nothing was remembered as number {index}")
    machine.push(machine.memo[index])


def _put(machine, index):
    machine.memo[index] = machine.top(object, "PUT")
    if len(machine.memo) > MAX_STACK:
        raise Fault(f"more than {MAX_STACK} objects are remembered")


def _global(machine, module, name):
    found = GLOBALS.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
    if found is None:
        raise Fault(
            f"it asks for {errors.quote(module, 60)}.{errors.quote(name, 60)}, which is no part of a state dict"
        )
    machine.push(found)


def _long(machine, count):
    if count < 0 or count > MAX_NUMBER:
        raise Fault(f"an integer of {count} bytes")
    machine.push(int.from_bytes(machine.take(count), "little", signed=True))


def _build(machine):
    state = machine.pop()
    machine.top(OrderedDict, "BUILD")
    if not isinstance(state, dict):
        raise Fault("an object is given a state that is no dict")


def _reduce(machine):
    arguments = machine.pop()
    function = machine.pop()
    if not isinstance(function, Global) or function.kind != "call" or not isinstance(arguments, tuple):
        raise Fault("something is called that is no function of a state dict")
    machine.push(_CALLS[function.value](arguments))


def _ordered_dict(arguments):
    if arguments:
        raise Fault("an OrderedDict is made with arguments")
    return OrderedDict()


def _size(arguments):
    return _sizes(arguments[0] if len(arguments) == 1 else None)


def _parameter(arguments):
    if len(arguments) != 3 or not isinstance(arguments[0], View):
        raise Fault("a parameter is made of something that is no tensor")
    return arguments[0]


def _tensor_v2(arguments):
    if len(arguments) not in (6, 7) or not isinstance(arguments[0], Storage) or arguments[0].dtype is None:
        raise Fault("a tensor is made of something that is no typed storage")
    storage, offset, shape, stride = arguments[:4]
    return _view(storage, storage.dtype, offset, shape, stride)


def _tensor_v3(arguments):
    good = len(arguments) in (7, 8) and isinstance(arguments[0], Storage) and isinstance(arguments[6], Global)
    if not good or arguments[6].kind != "dtype":
        raise Fault("a tensor is made of something that is no storage and dtype")
    return _view(arguments[0], arguments[6].value, *arguments[1:4])


def _view(storage, dtype, offset, shape, stride):
    shape, stride = _sizes(shape), _sizes(stride)
    if type(offset) is not int or offset < 0 or len(shape) != len(stride):
        raise Fault("a tensor has no proper offset, shape and stride")
    return View(storage, dtype, offset, shape, stride)


def _sizes(value):
    good = isinstance(value, tuple) and len(value) <= MAX_DIMS
    if not good or any(type(v) is not int or not 0 <= v < 2**48 for v in value):
        raise Fault(f"a shape or stride is not a tuple of at most {MAX_DIMS} sizes")
    return value


def _persistent(machine):
    parts = machine.pop()
    good = isinstance(parts, tuple) and len(parts) == 5 and parts[0] == "storage" and isinstance(parts[1], Global)
    if not good or parts[1].kind != "storage" or not isinstance(parts[2], str) or type(parts[4]) is not int:
        raise Fault("a storage is not named in torch's way")
    machine.push(Storage(parts[2], parts[1].value, parts[4]))


def _protocol(machine):
    if machine.number("B") > 5:
        raise Fault("an unknown pickle protocol")


def _text(form):
    return lambda m: m.push(m.take(m.number(form)).decode("utf-8"))


def _bytes(form):
    return lambda m: m.push(m.take(m.number(form)))


_CALLS = {
    "OrderedDict": _ordered_dict,
    "Size": _size,
    "_rebuild_parameter": _parameter,
    "_rebuild_tensor_v2": _tensor_v2,
    "_rebuild_tensor_v3": _tensor_v3,
}

_ACTIONS = {
    0x80: _protocol,
    0x95: lambda m: m.number("Q"),  # FRAME: a length, of no use here
    ord("("): lambda m: m.marks.append(len(m.stack)),
    ord("}"): lambda m: m.push({}),
    ord("]"): lambda m: m.push([]),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.pop_mark())),
    0x85: lambda m: m.push((m.pop(),)),
    0x86: lambda m: m.push((m.pop(), m.pop())[::-1]),
    0x87: lambda m: m.push((m.pop(), m.pop(), m.pop())[::-1]),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(m.number("i")),
    ord("K"): lambda m: m.push(m.number("B")),
    ord("M"): lambda m: m.push(m.number("H")),
    0x8A: lambda m: _long(m, m.number("B")),
    0x8B: lambda m: _long(m, m.number("i")),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    ord("X"): _text("I"),
    0x8C: _text("B"),
    0x8D: _text("Q"),
    ord("B"): _bytes("I"),
    ord("C"): _bytes("B"),
    0x8E: _bytes("Q"),
    ord("q"): lambda m: _put(m, m.number("B")),
    ord("r"): lambda m: _put(m, m.number("I")),
    0x94: lambda m: _put(m, len(m.memo)),
    ord("h"): lambda m: _get(m, m.number("B")),
    ord("j"): lambda m: _get(m, m.number("I")),
    ord("c"): lambda m: _global(m, m.line(), m.line()),
    0x93: lambda m: _global(m, *(m.pop(), m.pop())[::-1]),
    ord("R"): _reduce,
    ord("b"): _build,
    ord("s"): lambda m: _set_items(m, [m.pop(), m.pop()][::-1]),
    ord("u"): lambda m: _set_items(m, m.pop_mark()),
    ord("a"): lambda m: _append(m, [m.pop()]),
    ord("e"): lambda m: _append(m, m.pop_mark()),
    ord("Q"): _persistent,
}
