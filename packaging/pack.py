"""Makes a package for nodes without a compiler. `./echelon pack` calls it:

    pack.py --programs FOLDER --wheels WHEELS [--libtorch FOLDER] FILE

The archive has one folder, echelon-VERSION/: bin/, recipes/, licences, the start script `echelon`, and VERSION, which says
what the programs are made of and what they need. The same inputs give the same bytes.
"""

import argparse
import gzip
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
TIME = 315532800  # of every file in the archive: 1980, which every archive format has


def main():
    arguments = read_arguments()
    file = pathlib.Path(arguments.file)
    version = re.search(r'^version = "(.+)"$', (ROOT / "Cargo.toml").read_text(), re.M)[1]
    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as work:
        folder = pathlib.Path(work, f"echelon-{version}")
        (folder / "bin").mkdir(parents=True)
        programs = take_programs(pathlib.Path(arguments.programs), folder / "bin")
        take_recipes(folder / "recipes")
        for name in ("LICENSE-MIT", "LICENSE-APACHE"):
            shutil.copy(ROOT / name, folder)
        take_licences_of_crates(folder / "LICENSES-THIRD-PARTY")
        shutil.copy(ROOT / "packaging/start", folder / "echelon")
        (folder / "VERSION").write_text(describe(version, programs, arguments.wheels))
        if arguments.libtorch:
            take_libtorch(pathlib.Path(arguments.libtorch).resolve(), folder / "bin/ppo", folder / "libtorch")
        archive(folder, pathlib.Path(work, "archive"))
        os.rename(pathlib.Path(work, "archive"), file)
    print(f"{file}: {file.stat().st_size / (1 << 20):.1f} MiB")
    print(f"on a node: tar xzf {file.name} && echelon-{version}/echelon help")


def read_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--programs", required=True)
    parser.add_argument("--wheels", required=True)
    parser.add_argument("--libtorch")
    parser.add_argument("file")
    return parser.parse_args()


def fail(message):
    sys.exit(f"echelon: {message}")


# --- programs ---------------------------------------------------------------------------------------------------------


def take_programs(built, target):
    """Copies every program as it is to run elsewhere. One that `ppo` is too, under its name, becomes a link to it."""
    if not shutil.which("strip"):
        fail("strip is missing, which takes the programs' debug information out: install binutils, for example `apt install binutils`")
    names = sorted(source.stem for source in (ROOT / "src/bin").glob("*.rs"))
    missing = [name for name in names if not (built / name).is_file()]
    if missing:
        fail(f"{built} has no program {missing[0]}: build it with `cargo build --bins`")
    programs = {}
    for name in names:
        if name != "ppo" and said_by(built / "ppo", name, "--help").startswith(f"usage: {name} "):
            (target / name).symlink_to("ppo")
            continue
        subprocess.run(["strip", "--strip-all", "-o", target / name, built / name], check=True)
        program = Program(target / name)
        program.build = said_by(built / name, name, "--version").strip()
        if not re.fullmatch(r"\S+\+[0-9a-f]{16}", program.build):
            fail(f"{built / name} does not start, or does not say of which build it is: run `cargo build --bins`")
        program.forget(paths_of_this_machine(built, program.library_folders()))
        program.path.write_bytes(program.data)
        programs[name] = program
    return programs


def said_by(program, name, argument):
    """What a program prints that is called by a name, with one argument."""
    return subprocess.run([name, argument], executable=program, capture_output=True, text=True).stdout


def paths_of_this_machine(built, library_folders):
    """What the names of folders become in the programs, whose messages name lines of sources; this project's have no folder."""
    cargo = pathlib.Path(os.environ.get("CARGO_HOME") or pathlib.Path.home() / ".cargo")
    crates = [*cargo.glob("registry/src/*/"), *cargo.glob("git/checkouts/")]
    named = [(folder, "libtorch") for library_folder in library_folders for folder in [os.path.dirname(library_folder)]]
    named += [(folder, "crates") for folder in crates]
    named.append((built.resolve(), "build"))
    return sorted(((os.fsencode(folder), name) for folder, name in named), key=lambda path: -len(path[0]))


class Program:
    """A 64-bit little-endian ELF file."""

    DYNAMIC, VERSIONS_NEEDED = 6, 0x6FFFFFFE  # kinds of sections
    RPATH, RUNPATH, UNUSED = 15, 29, 0x6000000D  # kinds of entries in the dynamic section; loaders pass over the last

    def __init__(self, path):
        self.path = path
        self.data = bytearray(path.read_bytes())
        if self.data[:6] != b"\x7fELF\x02\x01":
            fail(f"{path.name} is not a program for this kind of machine: build it with `cargo build --bins`")
        (start,), (size, count) = struct.unpack_from("<Q", self.data, 40), struct.unpack_from("<HH", self.data, 58)
        self.sections = [struct.unpack_from("<IIQQQQIIQQ", self.data, start + size * at) for at in range(count)]

    def section(self, kind):
        """Where the one section of a kind begins and ends, where its strings begin, and its number of entries."""
        _, _, _, _, offset, size, strings, info, _, _ = next(section for section in self.sections if section[1] == kind)
        return offset, offset + size, self.sections[strings][4], info

    def text(self, at):
        return self.data[at : self.data.index(0, at)].decode()

    def search_paths(self):
        """Where entries that name folders for libraries are, and where the texts are that they point to."""
        begin, end, strings, _ = self.section(self.DYNAMIC)
        for at in range(begin, end, 16):
            tag, value = struct.unpack_from("<QQ", self.data, at)
            if tag in (self.RPATH, self.RUNPATH):
                yield at, strings + value

    def library_folders(self):
        return [folder for _, text in self.search_paths() for folder in self.text(text).split(":") if folder]

    def forget(self, paths):
        """Takes out where this machine has its libraries, and overwrites names of folders, of one length, with others."""
        for entry, text in self.search_paths():
            length = len(self.text(text))
            struct.pack_into("<Q", self.data, entry, self.UNUSED)
            self.data[text : text + length] = bytes(length)
        for path, name in paths:
            path += b"/"
            name = name.encode()[: len(path) - 1].ljust(len(path), b"/")
            self.data = self.data.replace(path, name)

    def versions_needed(self):
        """Names such as GLIBC_2.34 of what the program needs of the system's libraries."""
        at, _, strings, count = self.section(self.VERSIONS_NEEDED)
        for _ in range(count):
            _, num_names, _, names, following = struct.unpack_from("<HHIII", self.data, at)
            name_at = at + names
            for _ in range(num_names):
                _, _, _, name, next_name = struct.unpack_from("<IHHII", self.data, name_at)
                yield self.text(strings + name)
                name_at += next_name
            at += following


def describe(version, programs, wheels):
    """The file VERSION: what the start script goes by."""
    builds = sorted({program.build for program in programs.values()})
    if len(builds) != 1:
        fail(f"the programs are of {len(builds)} builds ({', '.join(builds)}): run `cargo build --bins`, and pack again")
    needed = {name for program in programs.values() for name in program.versions_needed()}

    def newest(prefix):
        versions = [name[len(prefix) :] for name in needed if re.fullmatch(re.escape(prefix) + r"[0-9.]+", name)]
        return max(versions, key=lambda version: [int(part) for part in version.split(".")])

    torch = re.search(r"torch==(\S+)", wheels)[1]
    lines = {
        "version": version,
        "build": builds[0],
        "machine": os.uname().machine,
        "glibc": newest("GLIBC_"),
        "libstdc++": f"GLIBCXX_{newest('GLIBCXX_')}",
        "torch": torch,
        "wheels": wheels,
    }
    return "".join(f"{name} {value}\n" for name, value in lines.items())


# --- everything else --------------------------------------------------------------------------------------------------


def take_recipes(target):
    shutil.copytree(ROOT / "recipes", target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))


def take_licences_of_crates(target):
    """Writes the licences of the crates that the programs are made of, each text once."""
    cargo = pathlib.Path(os.environ.get("CARGO_HOME") or pathlib.Path.home() / ".cargo")
    crates = re.findall(r'^name = "(.+)"\nversion = "(.+)"\nsource = ', (ROOT / "Cargo.lock").read_text(), re.M)
    texts = {}
    for name, version in crates:
        for folder in cargo.glob(f"registry/src/*/{name}-{version}/"):
            for file in sorted(folder.iterdir()):
                if file.is_file() and re.match("LICEN[CS]E|COPYING|NOTICE|UNLICENSE", file.name.upper()):
                    text = file.read_text(errors="replace").strip()
                    texts.setdefault(text, []).append(f"{name} {version}")
    parts = (f"{'=' * 80}\n{', '.join(dict.fromkeys(users))}\n{'=' * 80}\n{text}\n\n" for text, users in texts.items())
    target.write_text("".join(parts) or "The crates' sources, which have their licences, were not on the machine that packed.\n")


def take_libtorch(torch, program, target):
    """Copies PyTorch's libraries: all where those for CUDA are whole, else what a program loads; and their licences."""
    site = torch.parent  # PyTorch's libraries look for NVIDIA's beside their folder
    if (torch / "lib/libtorch_cuda.so").exists() and not loaded(program, torch, "libtorch_cuda.so")[1]:
        libraries = [*(torch / "lib").glob("*.so*"), *(site / "nvidia").rglob("*.so*")]
    else:
        libraries, missing = loaded(program, torch)
        if missing:
            fail(f"the PyTorch in {torch} is not whole, {missing[0]} is missing: run `./echelon setup`")
    licences = [
        file
        for folder in [*site.glob("torch-*.dist-info"), *site.glob("nvidia_*.dist-info")]
        for file in folder.rglob("*")
        if file.is_file() and re.match("LICEN[CS]E|NOTICE", file.name.upper())
    ]
    version = [name for name in (torch / "version.py", torch / "build-version") if name.exists()]
    for path in {path for path in [*libraries, *licences, *version] if site in path.parents}:  # not the system's
        place = target / path.relative_to(site)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)


def loaded(program, torch, also=""):
    """The libraries that the system's loader finds for a program, and the names of those that it does not find."""
    environment = {"LD_TRACE_LOADED_OBJECTS": "1", "LD_LIBRARY_PATH": str(torch / "lib"), "LD_PRELOAD": also}
    said = subprocess.run([program], env=dict(os.environ, **environment), capture_output=True, text=True).stdout
    found = [pathlib.Path(os.path.normpath(path)) for path in re.findall(r" => (/.*) \(0x", said)]
    missing = re.findall(r"(\S+) => not found", said)
    return found, [name for name in missing if name != "libcuda.so.1"]  # the driver's


def archive(folder, file):
    """Packs a folder under its name: sorted, and without what differs from machine to machine."""

    def plain(member):
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        member.mtime = TIME
        executable = member.isdir() or member.mode & 0o100
        member.mode = 0o755 if executable else 0o644
        return member

    with open(file, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
            tar.add(folder, folder.name, filter=plain)  # in the order of names


if __name__ == "__main__":
    try:
        main()
    except shutil.Error as error:  # of a whole folder: a list of what failed
        fail(f"no package was made: {error.args[0][0][2]}")
    except OSError as error:
        fail(f"no package was made: {error}")
    except subprocess.CalledProcessError as error:
        fail(f"no package was made: {error.cmd[0]} failed, its message stands above")
