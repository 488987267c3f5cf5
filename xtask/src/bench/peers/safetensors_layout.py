"""Where the tensors of a safetensors file lie: after eight bytes with a header's length, and the header, in JSON."""

import json
import struct

LENGTH_BYTES = 8


def header_bytes(length):
    """How long the header is that follows these eight bytes."""
    return struct.unpack("<Q", length)[0]


def tensors(header):
    """Name, place in the file, and size of each, in the order of their places. All are of 32-bit numbers."""
    start = LENGTH_BYTES + len(header)
    rows = ((name, *row["data_offsets"]) for name, row in json.loads(header).items() if name != "__metadata__")
    return sorted(((name, start + at, end - at) for name, at, end in rows), key=lambda row: row[1])


def read_tensors(file):
    """The same of an open file."""
    file.seek(0)
    return tensors(file.read(header_bytes(file.read(LENGTH_BYTES))))
