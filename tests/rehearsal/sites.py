#!/usr/bin/env python3
"""Where in a program the device was used: lines of source with their launches, host waits or uploads.

    sites.py REPORT.sites PROGRAM [DEPTH] [--kind launches|waits|uploads|fullest] [--under WHERE] [--by-operator]

REPORT.sites is what `rehearse -r REPORT` wrote, DEPTH how many lines of the stack to tell, innermost first (2). WHERE
is a part of a function's name or of a file's path: only what was called from there counts.
"""

import argparse
import collections
import functools
import os
import signal
import subprocess

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
THREAD_OF_LIBTORCH = "(a thread of libtorch's: the backward pass)"


def main():
    arguments = parse()
    rows = read(arguments.sites)
    totals = by_line(rows, find_sources(rows, arguments.program), arguments.kind, arguments.depth, arguments.under)
    print(f"{sum(totals.values()):9d} {arguments.kind}")
    together = collections.Counter()
    for (name, where), count in totals.items():
        together[name if arguments.by_operator or arguments.kind == "fullest" else "", where] += count
    for (name, where), count in together.most_common():
        print(f"{count:9d} {name:40s} {where}" if name else f"{count:9d} {where}")


def by_line(rows, sources, kind, depth=1, under=None):
    """Counts by the operator and by the innermost lines of the project."""
    totals = collections.Counter()
    for count, of_kind, name, frames in rows:
        if of_kind != kind:
            continue
        stack = [place for frame in frames for place in sources.get(frame, [])]
        if under and not any(under in text for place in stack for text in place):
            continue
        lines = [line for _, line in stack] or [THREAD_OF_LIBTORCH]
        totals[name, " < ".join(without_repeats(lines)[:depth])] += count
    return totals


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sites")
    parser.add_argument("program")
    parser.add_argument("depth", nargs="?", type=int, default=2)
    parser.add_argument("--kind", default="waits", choices=["launches", "waits", "uploads", "fullest"])
    parser.add_argument("--under")
    parser.add_argument("--by-operator", action="store_true")
    return parser.parse_args()


def read(path):
    """Count, kind, name and frames (library, address) of each row."""
    rows = []
    with open(path) as file:
        for line in file:
            count, kind, name, *frames = line.rstrip("\n").split("\t")
            rows.append((int(count), kind, name, tuple(tuple(frame.rsplit(" ", 1)) for frame in frames)))
    return rows


def find_sources(rows, program):
    """What `addr2line` says of the program's frames: functions and lines of the project, inlined ones first."""
    program = os.path.realpath(program)
    of_program = {frame for row in rows for frame in row[3] if os.path.basename(frame[0]) == os.path.basename(program)}
    addresses = sorted({address for _, address in of_program})
    told = subprocess.run(
        ["addr2line", "-afiC", "-e", program],
        input="\n".join(addresses), capture_output=True, text=True, check=True,
    ).stdout.splitlines()
    places, now = collections.defaultdict(list), None
    lines = iter(told)
    for line in lines:
        if line.startswith("0x"):
            now = "%x" % int(line, 16)
            continue
        place = in_project(next(lines).split(" (")[0])
        if place:
            places[now].append((line, place))
    return {frame: places[frame[1]] for frame in of_program}


@functools.lru_cache(maxsize=None)
def in_project(place):
    """The path in the project, whichever copy of it the program was built in; None for what is not of it."""
    path, _, line = place.partition(":")
    parts = path.strip("/").split("/")
    for i in range(len(parts) - 1):
        inner = "/".join(parts[i:])
        if parts[i][0] != "." and parts[i] != "target" and os.path.exists(os.path.join(ROOT, inner)):
            return f"{inner}:{line}"
    return None


def without_repeats(lines):
    return [line for i, line in enumerate(lines) if i == 0 or line != lines[i - 1]]


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `| head`
    main()
