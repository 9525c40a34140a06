#!/usr/bin/env bash
# tensorboardX 2.6.5. Two short runs write their curves into one folder, one after the other: two
# seeds of a comparison, say, or the parts of a run that was resumed.
#
# Expected: two event files, and TensorBoard shows the curves of both; or an error.
# Seen:     a SummaryWriter names its file by whole seconds and opens it anew. Where the second run
#           begins within the same second, its file has the name of the first run's and takes its
#           place. The first run's curves are gone, and nothing is said.
#
# Why it matters here: a simulated run of some rounds takes less than a second once it is compiled.
# So our callback names its files itself (fedbilevel.callbacks.TensorBoard).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "tensorboardX==2.6.5"
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
import time
from pathlib import Path

from tensorboardX import SummaryWriter
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c  # the format: length, its checksum, the event, its checksum


def run(folder, name):
    with SummaryWriter(str(folder)) as writer:
        writer.add_scalar(f"loss-{name}", 1.0, 0)


def curves(folder):
    """The names of the curves in all event files of a folder."""
    names = set()
    for file in folder.glob("events.*"):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            assert masked_crc32c(data[:8]) == int.from_bytes(data[8:12], "little")
            names |= {value.tag for value in event_pb2.Event.FromString(data[12 : 12 + size]).summary.value}
            data = data[16 + size :]
    return names


def both(folder, wait):
    while time.time() % 1 > 0.2:  # begin early in a second
        time.sleep(0.01)
    run(folder, "0")
    time.sleep(wait)
    run(folder, "1")
    found = curves(folder)
    print(f"second run {wait:g} s later: {len(list(folder.glob('events.*')))} event files, curves {sorted(found)}")
    return found


place = Path(sys.argv[1])
assert both(place / "apart", 1.1) == {"loss-0", "loss-1"}
assert both(place / "together", 0.0) == {"loss-1"}
PYTHON
