"""A strict walk over a zip archive: what its directory says is checked against the bytes before any is believed.

Used for torch files, .npz and .keras. Not a general unzip: nothing is ever written, encryption and odd methods are
refused, and the two places that name a member (its own header and the directory) must agree.
"""

import dataclasses
import itertools
import re
import struct
import zlib

from jaxsub import errors

MAX_MEMBERS = 100_000  # each costs some small reads; real files have thousands
MAX_DIRECTORY = 1 << 28  # bytes
MAX_RATIO = 256  # declared over stored bytes of a deflated member; weights deflate 1.1 times, zeros 1000 times
RATIO_SLACK = 1 << 20  # bytes that a member may hold beyond the ratio
STORED, DEFLATED = 0, 8
_FLAGS = 0x0808  # sizes follow the data; names are UTF-8
_LEVELS = 0x0006  # how hard the deflater tried
_UNSAFE = re.compile(r"^[/\\]|^[A-Za-z]:|\\|(^|/)\.\.?(/|$)|//|[\x00-\x1f\x7f]")
_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_ENTRY, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """One member: `stored` bytes from `offset` on are `size` bytes of content with checksum `crc`."""

    name: str
    method: int
    crc: int
    stored: int
    size: int
    offset: int


def fault(reader, reason, key=None, hint="the file is damaged or not what its name says; get it again"):
    """The InputError of a broken archive."""
    return errors.InputError(reader.file.path, reason, key=key, hint=hint, rule="H9")


def walk(reader):
    """Members by name, in file order, all checked; no content is read.

    Raises:
        InputError: cut short, inconsistent, encrypted, overlapping or repeated members, names that climb out.
    """
    position, size, count = _directory(reader)
    data = reader.read(position, size)
    members, spans, at = {}, [], 0
    for _ in range(count):
        header, name, at, member = _entry(reader, data, at)
        if name in members:
            raise fault(reader, "holds the same member twice", name)
        members[name] = member
        spans.append((header, member.offset + member.stored, name))
    if at != size:
        raise fault(reader, "has bytes in its directory that belong to no member")
    _require_apart(reader, spans, position)
    return dict(sorted(members.items(), key=lambda item: item[1].offset))


def _directory(reader):
    """(offset, bytes, members) of the directory, from the record at the end of the file."""
    total = reader.file.size
    tail_size = min(total, _END.size + 65535)
    tail = reader.read(total - tail_size, tail_size)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise fault(reader, "has no zip directory at its end: it is cut short, or no zip archive")
    _, disk, first_disk, here, count, size, position, comment = _END.unpack_from(tail, at)
    if disk or first_disk or here != count or at + _END.size + comment != len(tail):
        raise fault(reader, "has a damaged zip directory record")
    end = total - tail_size + at
    if end >= _LOCATOR.size and reader.read(end - _LOCATOR.size, 4) == b"PK\6\7":  # torch writes it for any size
        short, (count, size, position, end) = (count, size, position), _directory64(reader, end)
        limits = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        if any(a not in (b, limit) for a, b, limit in zip(short, (count, size, position), limits, strict=True)):
            raise fault(reader, "has two directory records that contradict each other")
    if count > MAX_MEMBERS:
        hint = "save it as safetensors, or in several files"
        raise errors.InputError(
            reader.file.path, f"says it has {count} members, more than {MAX_MEMBERS}", hint=hint, rule="H19"
        )
    if position + size != end or size > MAX_DIRECTORY:
        raise fault(reader, f"says its directory of {count} members has {size} bytes at {position}, which cannot be")
    return position, size, count


def _directory64(reader, end):
    sign, disk, position, disks = _LOCATOR.unpack(reader.read(end - _LOCATOR.size, _LOCATOR.size))
    if sign != b"PK\6\7" or disk or disks > 1:
        raise fault(reader, "has a damaged zip64 locator")
    sign, length, _, _, disk, first, here, count, size, start = _END64.unpack(reader.read(position, _END64.size))
    if sign != b"PK\6\6" or disk or first or here != count or position + 12 + length != end - _LOCATOR.size:
        raise fault(reader, "has a damaged zip64 directory record")
    return count, size, start, position


def _entry(reader, data, at):
    """(offset of the member's header, name, next place in the directory, Member)."""
    if len(data) - at < _ENTRY.size:
        raise fault(reader, "has a directory that is cut short")
    fields = _ENTRY.unpack_from(data, at)
    sign, _, _, flags, method, _, _, crc, stored, size, n, m, k, disk, _, _, header = fields
    at += _ENTRY.size
    if sign != b"PK\1\2" or len(data) - at < n + m + k:
        raise fault(reader, "has a damaged directory entry")
    name = _name(reader, data[at : at + n])
    if method not in (STORED, DEFLATED):
        raise fault(reader, f"is compressed by method {method}", name)
    if flags & ~(_FLAGS | (_LEVELS if method == DEFLATED else 0)):
        raise fault(reader, f"has the flags {flags:#06x} (encrypted?)", name)
    stored, size, header = _zip64(reader, name, data[at + n : at + n + m], [size, stored, header, disk])
    if method == STORED and stored != size:
        raise fault(reader, f"is stored in {stored} bytes and declared as {size}", name)
    if size > MAX_RATIO * stored + RATIO_SLACK:
        raise fault(reader, f"declares {size} bytes in {stored} stored ones", name)
    offset = _local(reader, name, header, (flags, method, crc, stored, size))
    return header, name, at + n + m + k, Member(name, method, crc, stored, size, offset)


def _name(reader, raw):
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise fault(reader, f"has a member name that is not UTF-8: {raw[:40]!r}") from None
    if not name or len(name) > 1024 or _UNSAFE.search(name):
        raise fault(reader, "has a member name that is no plain relative path", name)
    return name


def _zip64(reader, name, extra, values):
    """(stored, size, header) with the 64-bit values of the extra field where the directory has no room."""
    size, stored, header, disk = values
    wanted = [v == 0xFFFFFFFF for v in (size, stored, header)]
    at, found = 0, None
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        if tag == 1:
            found = extra[at + 4 : at + 4 + length]
        at += 4 + length
    if any(wanted):
        need = sum(wanted)
        if found is None or len(found) < 8 * need:
            raise fault(reader, "has no 64-bit sizes where it needs them", name)
        large = list(struct.unpack_from(f"<{need}Q", found))
        size, stored, header = (large.pop(0) if w else v for w, v in zip(wanted, (size, stored, header), strict=True))
    if disk not in (0, 0xFFFF) or header + stored > reader.file.size:
        raise fault(reader, f"claims {stored} bytes at {header} of a file of {reader.file.size}", name)
    return stored, size, header


def _local(reader, name, header, expected):
    """Where the content starts; the member's own header must tell the same story as the directory."""
    raw = reader.read(header, _LOCAL.size)
    sign, _, flags, method, _, _, crc, stored, size, n, m = _LOCAL.unpack(raw)
    same = sign == b"PK\3\4" and (flags, method) == expected[:2]
    if same and not flags & 8:  # else the three numbers follow the data
        pairs = zip((crc, stored, size), expected[2:], strict=True)
        same = all(a in (b, 0xFFFFFFFF) for a, b in pairs)
    if not same or reader.read(header + _LOCAL.size, n) != name.encode():
        raise fault(reader, "has a header that contradicts the directory", name)
    return header + _LOCAL.size + n + m


def _require_apart(reader, spans, directory):
    spans.sort()
    for (_, end, name), (following, _, _) in itertools.pairwise([*spans, (directory, 0, "")]):
        if end > following:
            raise fault(reader, "overlaps what comes after it", name)


def verify(reader, member):
    """Reads a stored member once and compares its checksum."""
    crc = 0
    for block in reader.blocks(member.offset, member.stored):
        crc = zlib.crc32(block, crc)
    if crc != member.crc:
        raise fault(reader, "has a wrong checksum: its bytes are not those that were written", member.name)


def content(reader, member):
    """The member's bytes, inflated if need be, with its size and checksum checked."""
    data = b"".join(inflate(reader, member))
    if zlib.crc32(data) != member.crc:
        raise fault(reader, "has a wrong checksum: its bytes are not those that were written", member.name)
    return data


def inflate(reader, member, size=1 << 20):
    """Blocks of the member's content, `size` bytes at most where it is deflated; never more than the declared size."""
    if member.method == STORED:
        for block in reader.blocks(member.offset, member.stored):
            yield bytes(block)
        return
    machine, left = zlib.decompressobj(-15), member.size
    try:
        for block in reader.blocks(member.offset, member.stored):
            pending = bytes(block)
            while pending:
                out = machine.decompress(pending, min(left + 1, size))
                left -= len(out)
                if left < 0:
                    raise fault(reader, f"inflates to more than the declared {member.size} bytes", member.name)
                yield out
                pending = machine.unconsumed_tail
    except zlib.error as error:
        raise fault(reader, f"does not inflate ({error})", member.name) from None
    if left or not machine.eof or machine.unused_data:
        raise fault(reader, f"does not inflate to the declared {member.size} bytes", member.name)
