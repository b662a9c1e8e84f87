//! A package for nodes without a compiler, made once of the programs as they were built, and its start script on nodes
//! that lack something.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

use tempfile::TempDir;

const LIMIT_BYTES: u64 = 45 << 20;

/// Makes the package and unpacks it, once for all tests; its size.
static PACKAGE: LazyLock<u64> = LazyLock::new(|| {
    let folder = folder();
    let _ = fs::remove_dir_all(&folder); // an earlier test run's
    fs::create_dir_all(&folder).unwrap();
    let programs = Path::new(env!("CARGO_BIN_EXE_ppo")).parent().unwrap();
    let mut pack = Command::new(root().join("echelon"));
    succeeds(pack.args(["pack", "package.tar.gz"]).current_dir(&folder).env("ECHELON_PROGRAMS", programs));
    succeeds(Command::new("tar").args(["xzf", "package.tar.gz"]).current_dir(&folder));
    fs::metadata(folder.join("package.tar.gz")).unwrap().len()
});

#[test]
fn a_package_is_small_and_has_every_program() {
    assert!(*PACKAGE <= LIMIT_BYTES, "{} bytes", *PACKAGE);
    for name in names(&root().join("src/bin")) {
        let name = name.trim_end_matches(".rs");
        let said = succeeds(&mut Node::new().command(&[name, "--help"]));
        assert!(said.contains(&format!("usage: {name} ")), "{name}: {said}");
    }
}

#[test]
fn a_package_says_what_it_was_built_from_and_holds_no_path_of_this_machine() {
    let version = succeeds(Command::new(package().join("echelon")).arg("version"));
    assert!(version.contains(&format!("build {}\n", echelon::program::BUILD)), "{version}");
    let cargo = std::env::var_os("CARGO_HOME")
        .map_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cargo"), PathBuf::from);
    let folders = [root(), libtorch(), &cargo].map(|folder| folder.to_str().unwrap());
    for file in files(&package()).iter().filter(|file| !file.is_symlink()) {
        let bytes = fs::read(file).unwrap();
        for folder in folders {
            let found = bytes.windows(folder.len()).any(|window| window == folder.as_bytes());
            assert!(!found, "{} names {folder}", file.display());
        }
    }
}

#[test]
fn a_recipe_of_the_package_is_planned_and_trained_by_workers_that_it_starts() {
    let node = Node::new();
    let recipe = package().join("recipes/quickstart.toml");
    let small = ["rollout.batch_size=8", "ppo.mini_batch_size=8", "eval.max_samples=8", "train.steps=1"];
    let mut start = node.command(&["ppo", recipe.to_str().unwrap(), "--set", "placement.workers=2"]);
    for setting in small {
        start.args(["--set", setting]);
    }
    start.args(["--output-dir", "run"]).current_dir(node.path(""));
    succeeds(&mut start);
    assert!(node.path("run/actor/model.safetensors").exists());
}

#[test]
fn another_pytorch_is_refused_with_its_version_and_place() {
    let node = Node::new();
    node.torch("2.9.1+cpu");
    let said = node.refuses(&[]);
    assert!(said.contains("PyTorch 2.9.1+cpu") && said.contains("PyTorch 2.11.0"), "{said}");
    assert!(said.contains(node.path("torch").to_str().unwrap()), "{said}");

    // The one that python3 would import, and none at all.
    let of_python = ("LIBTORCH", "");
    node.program("python3", &format!("echo '{}'", node.path("torch").display()));
    let said = node.refuses(&[of_python]);
    assert!(said.contains("python3's PyTorch is 2.9.1+cpu") && said.contains("pip install torch==2.11.0"), "{said}");
    node.program("python3", "exit 1");
    let said = node.refuses(&[of_python]);
    assert!(said.contains("no PyTorch was found") && said.contains("--with-libtorch"), "{said}");
    let said = node.refuses(&[("LIBTORCH", "/nowhere")]);
    assert!(said.contains("LIBTORCH is /nowhere, and there is no such folder"), "{said}");
}

#[test]
fn half_a_pytorch_is_refused_with_what_is_missing() {
    let node = Node::new();
    node.torch("2.11.0");
    let said = node.refuses(&[]);
    assert!(said.contains("lib/libtorch_cpu.so is missing") && said.contains("--force-reinstall"), "{said}");
    symlink(libtorch().join("lib/libtorch_cpu.so"), node.path("torch/lib/libtorch_cpu.so")).unwrap();
    let said = node.refuses(&[]);
    assert!(said.contains("lib/libc10.so is missing"), "{said}");
    if !libtorch().parent().unwrap().join("nvidia").is_dir() {
        return; // a PyTorch that was made without CUDA needs nothing beside it
    }
    for name in names(&libtorch().join("lib")) {
        let _there = symlink(libtorch().join("lib").join(&name), node.path("torch/lib").join(&name));
    }
    let said = node.refuses(&[]);
    assert!(said.contains("also without a GPU") && said.contains("nvidia-cuda-cupti=="), "{said}");
}

#[test]
fn another_system_is_refused_with_what_to_use_instead() {
    let node = Node::new();
    node.program("uname", "[ $1 = -s ] && echo Linux || echo aarch64");
    let said = node.refuses(&[]);
    assert!(said.contains("this node is Linux aarch64, and the package is for Linux x86_64"), "{said}");

    let node = Node::new();
    node.program("getconf", "echo glibc 2.17");
    let said = node.refuses(&[]);
    assert!(said.contains("glibc is 2.17 here") && said.contains("use a newer node"), "{said}");
    node.program("getconf", "exit 1");
    let said = node.refuses(&[]);
    assert!(said.contains("is not glibc"), "{said}");
}

#[test]
fn an_old_standard_library_is_refused_with_what_it_lacks() {
    let node = Node::new();
    let version = fs::read_to_string(package().join("VERSION")).unwrap();
    let needed = version.lines().find_map(|line| line.strip_prefix("libstdc++ ")).unwrap();
    let loaded = Command::new(package().join("bin/ppo")).env("LD_TRACE_LOADED_OBJECTS", "1").output().unwrap();
    let loaded = String::from_utf8(loaded.stdout).unwrap();
    let library = loaded.lines().find_map(|line| line.split_once("libstdc++.so.6 => ")).unwrap().1;
    let mut old = fs::read(library.split(" (0x").next().unwrap()).unwrap();
    let named = format!("{needed}\0");
    let at = old.windows(named.len()).position(|window| window == named.as_bytes()).expect("the version's name");
    old[at] = b'X';
    fs::create_dir(node.path("old")).unwrap();
    fs::write(node.path("old/libstdc++.so.6"), old).unwrap();
    let said = node.refuses(&[("LD_LIBRARY_PATH", node.path("old").to_str().unwrap())]);
    assert!(said.contains("libstdc++.so.6 is too old") && said.contains(needed), "{said}");
}

#[test]
fn a_driver_without_cuda_libraries_is_noted() {
    let node = Node::new();
    node.torch("2.11.0");
    for name in names(&libtorch().join("lib")).iter().filter(|name| !name.starts_with("libtorch_cuda")) {
        symlink(libtorch().join("lib").join(name), node.path("torch/lib").join(name)).unwrap();
    }
    let nvidia = libtorch().parent().unwrap().join("nvidia");
    if nvidia.is_dir() {
        symlink(nvidia, node.path("nvidia")).unwrap();
    }
    fs::create_dir(node.path("driver")).unwrap();
    fs::write(node.path("driver/libcuda.so.1"), "").unwrap();
    let mut start = node.command(&["ppo", "--help"]);
    let said = succeeds(start.env("LD_LIBRARY_PATH", node.path("driver")));
    assert!(said.contains("has an NVIDIA driver, but the PyTorch in") && said.contains("usage: ppo"), "{said}");
}

#[test]
fn a_program_that_is_not_there_is_a_usage_error() {
    for wrong in ["trian", "../echelon", "--resume"] {
        let output = Node::new().command(&[wrong]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        assert!(text(&output).contains("./echelon help"), "{}", text(&output));
    }
    assert!(succeeds(&mut Node::new().command(&["help"])).contains("usage: ./echelon PROGRAM"));
}

/// A bare node: a PATH with what every Linux has, where programs can be stood in for, and a PyTorch folder of its own.
struct Node(TempDir);

impl Node {
    fn new() -> Node {
        let node = Node(tempfile::tempdir().unwrap());
        fs::create_dir(node.path("bin")).unwrap();
        for tool in ["cat", "dirname", "getconf", "head", "ls", "readlink", "sh", "uname"] {
            let path = std::env::var_os("PATH").unwrap();
            let found = std::env::split_paths(&path).map(|folder| folder.join(tool)).find(|file| file.is_file());
            symlink(found.unwrap_or_else(|| panic!("this machine has no {tool}")), node.path("bin").join(tool))
                .unwrap();
        }
        node
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    /// Puts a program, or another one, on the node's PATH.
    fn program(&self, name: &str, script: &str) {
        let path = self.path("bin").join(name);
        let _ = fs::remove_file(&path); // a link, which writing would follow
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Makes the folder of a PyTorch of this version, without libraries.
    fn torch(&self, version: &str) {
        fs::create_dir_all(self.path("torch/lib")).unwrap();
        let text = format!("from typing import Optional\n__all__ = ['__version__']\n__version__ = '{version}'\n");
        fs::write(self.path("torch/version.py"), text).unwrap();
    }

    /// The package's start script with the node's PyTorch where it has one, else with this machine's.
    fn command(&self, arguments: &[&str]) -> Command {
        let own = self.path("torch");
        let mut start = Command::new(package().join("echelon"));
        start.args(arguments).env_clear().env("PATH", self.path("bin")).env("HOME", self.path(""));
        start.env("OMP_NUM_THREADS", "1").env("LIBTORCH", if own.is_dir() { own.as_path() } else { libtorch() });
        start
    }

    /// What the start script says that refuses to start `ppo` in this environment.
    fn refuses(&self, environment: &[(&str, &str)]) -> String {
        let output = self.command(&["ppo", "--help"]).envs(environment.iter().copied()).output().unwrap();
        let said = text(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.starts_with("echelon: ") && said.lines().count() == 1, "one sentence: {said}");
        said
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where the package is made.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("package")
}

/// The unpacked package.
fn package() -> PathBuf {
    LazyLock::force(&PACKAGE);
    folder().join(concat!("echelon-", env!("CARGO_PKG_VERSION")))
}

/// The `torch` folder that the programs were linked with.
fn libtorch() -> &'static Path {
    static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
        let named = std::env::var_os("LIBTORCH").map_or(root().join(".libtorch/torch"), PathBuf::from);
        named.canonicalize().unwrap()
    });
    &FOLDER
}

/// What a command printed that must end well.
fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{command:?}: {}", text(&output));
    text(&output)
}

fn names(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}
