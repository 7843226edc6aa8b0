"""Scalars as an event file of TensorBoard: records of protocol buffers, written by hand: nothing is needed for it.

record   length (uint64), masked crc32c of it, Event, masked crc32c of it
Event    1: wall time (double), 2: step (int64), 3: file version (text) or 5: Summary { 1: Value { 1: tag, 2: value } }
"""

import functools
import os
import struct

from jaxsub.formats import _files


def write(folder, scalars, *, wall_time=0.0):
    """Writes `folder`/events.out.tfevents.jaxsub, whole or not at all.

    Args:
        folder: made if missing.
        scalars: [(step, name, value)].
        wall_time: seconds of every event; zero makes the same file of the same metrics.
    """
    _files.make_folder(folder)
    first = _message(1, wall_time) + _message(3, b"brain.Event:2")
    events = [first]
    for step, name, value in scalars:
        summary = _message(1, _message(1, name.encode()) + b"\x15" + struct.pack("<f", value))
        events.append(_message(1, wall_time) + _message(2, step) + _message(5, summary))
    _files.write_atomic(os.path.join(folder, "events.out.tfevents.jaxsub"), [_record(event) for event in events])


def _message(field, value):
    if isinstance(value, float):
        return bytes([field << 3 | 1]) + struct.pack("<d", value)
    if isinstance(value, int):
        return bytes([field << 3]) + _varint(value)
    return bytes([field << 3 | 2]) + _varint(len(value)) + value


def _varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _record(event):
    length = struct.pack("<Q", len(event))
    return length + struct.pack("<I", _masked(length)) + event + struct.pack("<I", _masked(event))


def _masked(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _table()[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _table():
    found = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        found.append(byte)
    return found
