//! Files and folders that have their name only when they are complete: written beside it, synced, renamed (AR-13).

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

/// Writes a file in one move: a reader finds what was there before or all of `bytes`.
///
/// # Errors
/// The operating system's.
pub fn write_whole(path: &Path, bytes: impl AsRef<[u8]>) -> io::Result<()> {
    let mut file = WholeFile::create(path, 0o666)?;
    file.write_all(bytes.as_ref())?;
    file.finish()
}

/// A file on its way to its name; dropped before [`WholeFile::finish`], it goes.
#[derive(Debug)]
pub struct WholeFile {
    path: PathBuf,
    unfinished: PathBuf,
    file: BufWriter<File>,
}

impl WholeFile {
    /// `mode` says who may read and write it.
    ///
    /// # Errors
    /// The operating system's; no file name.
    pub fn create(path: &Path, mode: u32) -> io::Result<WholeFile> {
        let unfinished = beside(path)?;
        let _ = fs::remove_file(&unfinished);
        let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&unfinished)?;
        Ok(WholeFile { path: path.into(), unfinished, file: BufWriter::new(file) })
    }

    /// Gives the file its name, in the place of what had it.
    ///
    /// # Errors
    /// The operating system's.
    pub fn finish(mut self) -> io::Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync_all()?;
        fs::rename(&self.unfinished, &self.path)?;
        sync_folder_of(&self.path)
    }
}

impl Write for WholeFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for WholeFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.unfinished); // gone once it was renamed
    }
}

/// A folder that is made beside its name, and gets it when it is whole; dropped before, it goes.
pub struct WholeFolder {
    path: PathBuf,
    unfinished: PathBuf,
}

impl WholeFolder {
    /// A folder that is to be `path`, made as `unfinished` in the same file system. Nothing is there yet: what an earlier
    /// attempt left is removed.
    ///
    /// # Errors
    /// The operating system's.
    pub fn begin(path: &Path, unfinished: PathBuf) -> io::Result<WholeFolder> {
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished)?;
        }
        Ok(WholeFolder { path: path.into(), unfinished })
    }

    /// Where it is made.
    pub fn unfinished(&self) -> &Path {
        &self.unfinished
    }

    /// Gives the folder its name, in the place of what had it. Its files are synced by who wrote them.
    ///
    /// # Errors
    /// The operating system's.
    pub fn finish(self) -> io::Result<()> {
        File::open(&self.unfinished)?.sync_all()?;
        if self.path.exists() {
            // In one move, so that neither name is ever without a folder; what was there goes with the unfinished name.
            let exchanged = renameat_with(CWD, &self.unfinished, CWD, &self.path, RenameFlags::EXCHANGE);
            if exchanged.is_ok() {
                return sync_folder_of(&self.path);
            }
            fs::remove_dir_all(&self.path)?; // a file system that cannot exchange
        }
        fs::rename(&self.unfinished, &self.path)?;
        sync_folder_of(&self.path)
    }
}

impl Drop for WholeFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.unfinished); // gone once it was renamed; the old one once exchanged
    }
}

/// A hidden name in the same folder, this process's own.
///
/// # Errors
/// `path` has no last part.
pub fn beside(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no file name"))?;
    Ok(path.with_file_name(format!(".{}.partial-{}", name.to_string_lossy(), std::process::id())))
}

fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match File::open(folder) {
        Ok(folder) => folder.sync_all(),
        Err(_) => Ok(()), // one that may be written to and not read
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        entries.map(|name| name.into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_appears_when_it_is_complete() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_whole(&path, "one").unwrap();
        let mut abandoned = WholeFile::create(&path, 0o666).unwrap();
        abandoned.write_all(b"half").unwrap();
        drop(abandoned);
        assert_eq!(fs::read(&path).unwrap(), b"one");
        write_whole(&path, "two").unwrap();
        assert_eq!(
            (fs::read(&path).unwrap().as_slice(), names(folder.path())),
            (b"two".as_slice(), vec!["a.json".into()])
        );
        assert!(write_whole(&path.join("b"), "").is_err());
    }

    #[test]
    fn a_folder_takes_the_place_of_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        for text in ["one", "two"] {
            let whole = WholeFolder::begin(&path, folder.path().join("model.unfinished")).unwrap();
            fs::create_dir(whole.unfinished()).unwrap();
            fs::write(whole.unfinished().join(text), text).unwrap();
            whole.finish().unwrap();
            assert_eq!((names(folder.path()), names(&path)), (vec!["model".into()], vec![text.to_string()]));
        }
        let nothing = WholeFolder::begin(&path, folder.path().join("model.unfinished")).unwrap();
        assert!(nothing.finish().is_err());
        assert_eq!(names(&path), ["two"]);
    }
}
