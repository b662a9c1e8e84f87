//! Models by name: a folder on disk, or an id on the Hugging Face hub.
//!
//! [`resolve_model`] turns either into a folder. Downloads go through the `hf-hub` crate into the cache that Python's
//! `huggingface_hub` shares, and honour its variables: `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`. The
//! weights are fetched last, so a snapshot that has them is complete, and using it again asks the hub nothing.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use thiserror::Error;

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
/// Files that a model may lack.
const OPTIONAL: [&str; 9] = [
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
];

/// Waits before the second and third attempt of a download that broke off.
const RETRY_WAITS: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(3)];

/// The folder of the model that `reference` names.
///
/// A folder, absolute or relative to `base_dir`, is used as it is. Otherwise `owner/name` or `owner/name@revision` is
/// looked up in the cache and, unless its files are all there, on the hub.
///
/// # Errors
/// [`HubError`] names the reference, the file and what to do about it.
pub fn resolve_model(reference: &str, base_dir: &Path) -> Result<PathBuf, HubError> {
    resolve(reference, base_dir, || HubSettings::from_variables(|name| std::env::var(name).ok()))
}

/// Why a model could not be found or fetched.
#[derive(Debug, Error)]
pub enum HubError {
    #[error("model \"{reference}\": there is no folder {}, and it is not a hub id of the form owner/name[@revision]", folder.display())]
    NoSuchModel { reference: String, folder: PathBuf },

    #[error("model \"{reference}\": {} is a file; a model is a Hugging Face folder (the import program turns a GGUF file into one)", path.display())]
    NotAFolder { reference: String, path: PathBuf },

    #[error("model {id}: there is no folder {}, and {endpoint} has no {file} at revision {revision}; check the spelling of the id and the revision", folder.display())]
    NotOnHub { id: String, revision: String, file: String, endpoint: String, folder: PathBuf },

    #[error(
        "model {id}: neither {WEIGHTS} nor {WEIGHTS_INDEX} at revision {revision}; only safetensors weights are read"
    )]
    NoWeights { id: String, revision: String },

    #[error(
        "model {id}: {file}: access refused (status {status}); check the spelling of the id, and for a private or gated model set HF_TOKEN to a token that may read it"
    )]
    Refused { id: String, file: String, status: u16 },

    #[error("model {id}: not complete in the cache {}, and HF_HUB_OFFLINE forbids fetching it; unset it once, or name a folder", cache.display())]
    Offline { id: String, cache: PathBuf },

    #[error("model {id}: {WEIGHTS_INDEX}: {detail}")]
    Index { id: String, detail: String },

    #[error(
        "model {id}: {file} belongs to another revision than {CONFIG}: the repository changed meanwhile; try again"
    )]
    Changed { id: String, file: String },

    #[error("model {id}: {file}: download failed: {source}; try again (HF_ENDPOINT is {endpoint})")]
    Download { id: String, file: String, endpoint: String, source: Box<ApiError> },

    #[error("model {id}: no folder for the cache: set HF_HOME")]
    NoCache { id: String },
}

/// Where models come from and are kept.
#[derive(Debug, Clone)]
struct HubSettings {
    endpoint: String,
    /// The folder of `hub/` and `token`; `None` without `HF_HOME` and a home directory.
    home: Option<PathBuf>,
    token: Option<String>,
    offline: bool,
}

impl HubSettings {
    /// Settings from the variables of Python's `huggingface_hub`.
    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        let default_home = || Some(std::env::home_dir()?.join(".cache/huggingface"));
        let offline = set("HF_HUB_OFFLINE")
            .is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str()));
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            home: set("HF_HOME").map(PathBuf::from).or_else(default_home),
            token: set("HF_TOKEN"),
            offline,
        }
    }
}

fn resolve(reference: &str, base_dir: &Path, settings: impl FnOnce() -> HubSettings) -> Result<PathBuf, HubError> {
    let folder = base_dir.join(reference);
    if folder.is_dir() {
        return Ok(folder);
    }
    if folder.is_file() {
        return Err(HubError::NotAFolder { reference: reference.to_owned(), path: folder });
    }
    let Some((id, revision)) = hub_id(reference) else {
        return Err(HubError::NoSuchModel { reference: reference.to_owned(), folder });
    };
    let settings = settings();
    let Some(home) = &settings.home else {
        return Err(HubError::NoCache { id: id.to_owned() });
    };
    let cache = Cache::new(home.join("hub"));
    let repo = Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned());
    match cached_snapshot(&cache.repo(repo.clone())) {
        // Whoever filled the cache may have left the tokenizer out: look for it while the hub can be asked.
        Some(snapshot) if settings.offline || snapshot.join(TOKENIZER).exists() => {
            return Ok(snapshot);
        }
        _ if settings.offline => {
            return Err(HubError::Offline { id: id.to_owned(), cache: cache.path().clone() });
        }
        _ => {}
    }
    let remote = RemoteModel::connect(id, revision, repo, cache, &settings)?;
    remote.fetch_all(folder)
}

/// Splits `owner/name[@revision]`; `None` when it cannot be a hub id.
fn hub_id(reference: &str) -> Option<(&str, &str)> {
    let (id, revision) = reference.split_once('@').unwrap_or((reference, "main"));
    let (owner, name) = id.split_once('/')?;
    let is_word = |word: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !word.is_empty() && word.chars().all(allowed) && !word.starts_with('.') && !word.contains("..")
    };
    (is_word(owner) && is_word(name) && revision.split('/').all(is_word)).then_some((id, revision))
}

/// The cached snapshot, if its configuration and all its weights are there.
fn cached_snapshot(cache: &CacheRepo) -> Option<PathBuf> {
    let snapshot = cache.get(CONFIG)?.parent()?.to_path_buf();
    if cache.get(WEIGHTS).is_some() {
        return Some(snapshot);
    }
    let index = std::fs::read_to_string(cache.get(WEIGHTS_INDEX)?).ok()?;
    let shards = shard_names(&index).ok()?;
    shards.iter().all(|shard| snapshot.join(shard).exists()).then_some(snapshot)
}

/// The files that an index of sharded weights names, each once.
///
/// A name with a path could leave the cache folder and is refused.
fn shard_names(index: &str) -> Result<Vec<String>, String> {
    let index: serde_json::Value = serde_json::from_str(index).map_err(|cause| cause.to_string())?;
    let map = index["weight_map"].as_object().ok_or("expected an object weight_map of tensor names to files")?;
    let mut names = Vec::new();
    for (tensor, file) in map {
        let plain =
            |name: &&str| name.ends_with(".safetensors") && !name.contains(['/', '\\']) && !name.starts_with('.');
        let name = file.as_str().filter(plain);
        let name = name.ok_or_else(|| format!("{tensor}: expected the name of a .safetensors file, found {file}"))?;
        names.push(name.to_owned());
    }
    names.sort_unstable();
    names.dedup();
    if names.is_empty() { Err("weight_map is empty".to_owned()) } else { Ok(names) }
}

/// One revision of a model on the hub.
struct RemoteModel<'a> {
    id: &'a str,
    revision: &'a str,
    endpoint: &'a str,
    repo: ApiRepo,
}

impl<'a> RemoteModel<'a> {
    fn connect(
        id: &'a str,
        revision: &'a str,
        repo: Repo,
        cache: Cache,
        settings: &'a HubSettings,
    ) -> Result<Self, HubError> {
        let mut builder = ApiBuilder::from_cache(cache)
            .with_endpoint(settings.endpoint.clone())
            .with_progress(std::io::stderr().is_terminal());
        if let Some(token) = &settings.token {
            builder = builder.with_token(Some(token.clone()));
        }
        let endpoint = &settings.endpoint;
        let api = builder.build().map_err(|cause| failed(id, CONFIG, endpoint, cause))?;
        Ok(Self { id, revision, endpoint, repo: api.repo(repo) })
    }

    /// Fetches configuration, tokenizer and weights, in this order; returns the snapshot's folder.
    fn fetch_all(&self, folder: PathBuf) -> Result<PathBuf, HubError> {
        let config = self.fetch(CONFIG)?.ok_or_else(|| HubError::NotOnHub {
            id: self.id.to_owned(),
            revision: self.revision.to_owned(),
            file: CONFIG.to_owned(),
            endpoint: self.endpoint.to_owned(),
            folder,
        })?;
        let snapshot = config.parent().unwrap_or(&config).to_path_buf();
        for file in OPTIONAL {
            self.fetch_into(&snapshot, file)?;
        }
        if self.fetch_into(&snapshot, WEIGHTS)? {
            return Ok(snapshot);
        }
        if !self.fetch_into(&snapshot, WEIGHTS_INDEX)? {
            return Err(HubError::NoWeights { id: self.id.to_owned(), revision: self.revision.to_owned() });
        }
        let wrong = |detail: String| HubError::Index { id: self.id.to_owned(), detail };
        let index = std::fs::read_to_string(snapshot.join(WEIGHTS_INDEX)).map_err(|cause| wrong(cause.to_string()))?;
        for shard in shard_names(&index).map_err(wrong)? {
            if !self.fetch_into(&snapshot, &shard)? {
                return Err(wrong(format!("it names {shard}, which the repository does not have")));
            }
        }
        Ok(snapshot)
    }

    /// Fetches `file` into `snapshot`; false when the repository has no such file.
    fn fetch_into(&self, snapshot: &Path, file: &str) -> Result<bool, HubError> {
        match self.fetch(file)? {
            None => Ok(false),
            Some(path) if path.parent() == Some(snapshot) => Ok(true),
            Some(_) => Err(HubError::Changed { id: self.id.to_owned(), file: file.to_owned() }),
        }
    }

    /// The cached or fetched file; `None` when the repository has none of this name.
    ///
    /// An attempt continues where the one before broke off: hf-hub keeps the part and asks for the rest. Its own
    /// retries are not used, they append from a wrong position when the first attempt fails before its first byte.
    fn fetch(&self, file: &str) -> Result<Option<PathBuf>, HubError> {
        let mut waits = RETRY_WAITS.iter();
        loop {
            let cause = match self.repo.get(file) {
                Ok(path) => return Ok(Some(path)),
                Err(cause) => cause,
            };
            match status(&cause) {
                Some(404) => return Ok(None),
                Some(status @ (401 | 403)) => {
                    return Err(HubError::Refused { id: self.id.to_owned(), file: file.to_owned(), status });
                }
                _ => {}
            }
            match waits.next() {
                Some(wait) if is_transient(&cause) => std::thread::sleep(*wait),
                _ => return Err(failed(self.id, file, self.endpoint, cause)),
            }
        }
    }
}

fn failed(id: &str, file: &str, endpoint: &str, cause: ApiError) -> HubError {
    let [id, file, endpoint] = [id, file, endpoint].map(str::to_owned);
    HubError::Download { id, file, endpoint, source: Box::new(cause) }
}

fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(cause) => match **cause {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        _ => None,
    }
}

/// Whether another attempt may succeed: the connection broke, or the server is busy.
fn is_transient(error: &ApiError) -> bool {
    match error {
        ApiError::RequestError(cause) => match &**cause {
            ureq::Error::StatusCode(status) => *status == 429 || *status >= 500,
            ureq::Error::Io(cause) => cause.kind() != std::io::ErrorKind::ConnectionRefused,
            ureq::Error::Timeout(_) => true,
            _ => false,
        },
        ApiError::IoError(cause) => cause.kind() != std::io::ErrorKind::StorageFull,
        _ => false,
    }
}

#[cfg(test)]
mod tests;
