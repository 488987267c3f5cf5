"""Layout of a safetensors file: eight bytes with the length of the header, the header in JSON, then the tensors."""

import json
import struct

LENGTH_BYTES = 8


def header_length(first_bytes):
    """Returns the length of the header, given the first eight bytes of the file."""
    return struct.unpack("<Q", first_bytes)[0]


def tensors(header):
    """Returns name, file offset and size of each tensor, sorted by offset."""
    start = LENGTH_BYTES + len(header)
    rows = ((name, *row["data_offsets"]) for name, row in json.loads(header).items() if name != "__metadata__")
    return sorted(((name, start + at, end - at) for name, at, end in rows), key=lambda row: row[1])


def read_tensors(file):
    """Reads the header of an open file. Returns name, file offset and size of each tensor, sorted by offset."""
    file.seek(0)
    return tensors(file.read(header_length(file.read(LENGTH_BYTES))))
