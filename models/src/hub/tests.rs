//! A hub on the loopback interface, as far as `hf-hub` talks to one, and the models it serves.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Serves `files` (path after the host -> contents) until the test ends, and keeps the requests it saw.
struct Hub {
    endpoint: String,
    requests: Arc<Mutex<Vec<String>>>,
}

/// What a server thread needs to answer.
struct Shelf {
    files: HashMap<String, Vec<u8>>,
    /// Closes the connection in the middle of the first body of this path.
    breaks_once: Mutex<Option<String>>,
    endpoint: String,
}

impl Hub {
    fn serve(files: &[(&str, &[u8])], breaks_once: Option<&str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let shelf = Shelf {
            files: files.iter().map(|(path, data)| ((*path).to_owned(), data.to_vec())).collect(),
            breaks_once: Mutex::new(breaks_once.map(str::to_owned)),
            endpoint: endpoint.clone(),
        };
        let seen = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = answer(stream.unwrap(), &shelf, &seen);
            }
        });
        Self { endpoint, requests }
    }

    fn take_requests(&self) -> Vec<String> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }
}

/// Answers one request: 206 with the headers of the hub, 302 to the store for weights, 401 for gated models, 404.
fn answer(mut stream: TcpStream, shelf: &Shelf, seen: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap()?;
    let path = request.split(' ').nth(1).unwrap().to_owned();
    seen.lock().unwrap().push(path.clone());
    let (mut start, mut end, mut token) = (0, None, false);
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if let Some(range) = line.strip_prefix("range: bytes=") {
            let (first, last) = range.split_once('-').unwrap();
            (start, end) = (first.parse().unwrap(), last.parse::<usize>().ok());
        }
        token |= line == "authorization: bearer hf_secret";
        if line.is_empty() {
            break;
        }
    }
    let common = format!("X-Repo-Commit: {COMMIT}\r\nConnection: close\r\n");
    if path.starts_with("/gated/") && !token {
        return write!(stream, "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n{common}\r\n");
    }
    let stored = path.strip_prefix("/store").unwrap_or(&path);
    let Some(data) = shelf.files.get(stored) else {
        return write!(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n{common}\r\n");
    };
    let etag = format!("{:x}-{}", data.len(), stored.replace(['/', '.'], "-"));
    if path.ends_with(".safetensors") && !path.starts_with("/store") {
        let location = format!("{}/store{path}", shelf.endpoint);
        let linked = format!("X-Linked-Etag: \"{etag}\"\r\nETag: \"of the pointer\"\r\n");
        return write!(
            stream,
            "HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n{linked}{common}\r\n"
        );
    }
    let end = end.map_or(data.len(), |last| (last + 1).min(data.len()));
    let body = &data[start.min(end)..end];
    let range = format!("Content-Range: bytes {start}-{}/{}\r\n", end.saturating_sub(1), data.len());
    let length = format!("Content-Length: {}\r\nETag: \"{etag}\"\r\n", body.len());
    write!(stream, "HTTP/1.1 206 Partial Content\r\n{length}{range}{common}\r\n")?;
    let mut breaking = shelf.breaks_once.lock().unwrap();
    if body.len() > 1 && breaking.as_deref() == Some(stored) {
        *breaking = None;
        return stream.write_all(&body[..body.len() / 2]);
    }
    stream.write_all(body)
}

/// A cache folder of one test, removed at its end.
struct TestHome(PathBuf);

impl TestHome {
    fn new(test: &str) -> Self {
        Self(tempfile::Builder::new().prefix(&format!("echelon-hub-{test}-")).tempdir().unwrap().keep())
    }

    fn settings(&self, endpoint: &str) -> HubSettings {
        HubSettings { endpoint: endpoint.to_owned(), home: Some(self.0.clone()), token: None, offline: false }
    }
}

impl Drop for TestHome {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn resolve_at(home: &TestHome, settings: &HubSettings, reference: &str) -> Result<PathBuf, HubError> {
    resolve(reference, &home.0, || settings.clone())
}

#[test]
fn a_model_is_fetched_once() {
    let weights: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    let files: [(&str, &[u8]); 4] = [
        ("/geese/grey/resolve/main/config.json", b"{\"model_type\": \"llama\"}"),
        ("/geese/grey/resolve/main/tokenizer.json", b"{}"),
        ("/geese/grey/resolve/main/chat_template.jinja", b"{{ messages }}"),
        ("/geese/grey/resolve/main/model.safetensors", &weights),
    ];
    let hub = Hub::serve(&files, None);
    let home = TestHome::new("once");
    let settings = home.settings(&hub.endpoint);

    let folder = resolve_at(&home, &settings, "geese/grey").unwrap();
    for (path, data) in files {
        let name = path.rsplit('/').next().unwrap();
        assert!(std::fs::read(folder.join(name)).unwrap() == data, "{name}");
    }
    assert!(hub.take_requests().iter().any(|path| path == "/store/geese/grey/resolve/main/model.safetensors"));

    assert_eq!(resolve_at(&home, &settings, "geese/grey").unwrap(), folder);
    let offline = HubSettings { offline: true, ..settings.clone() };
    assert_eq!(resolve_at(&home, &offline, "geese/grey").unwrap(), folder);
    assert_eq!(hub.take_requests(), Vec::<String>::new(), "the second time comes from the cache");
}

#[test]
fn shards_and_revision_are_followed() {
    let index = br#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors",
        "c": "model-00001-of-00002.safetensors"}}"#;
    let at = |name: &str| format!("/geese/snow/resolve/v1.0/{name}");
    let names = [
        at("config.json"),
        at(WEIGHTS_INDEX),
        at("model-00001-of-00002.safetensors"),
        at("model-00002-of-00002.safetensors"),
    ];
    let files: [(&str, &[u8]); 4] =
        [(&names[0], b"{}"), (&names[1], index), (&names[2], b"first"), (&names[3], b"second")];
    let home = TestHome::new("shards");

    let hub = Hub::serve(&files[..3], None);
    let settings = home.settings(&hub.endpoint);
    let message = resolve_at(&home, &settings, "geese/snow@v1.0").unwrap_err().to_string();
    let missing = "model geese/snow: model.safetensors.index.json: it names model-00002-of-00002.safetensors, which the repository does not have";
    assert_eq!(message, missing);

    let hub = Hub::serve(&files, None);
    let folder = resolve_at(&home, &home.settings(&hub.endpoint), "geese/snow@v1.0").unwrap();
    assert_eq!(std::fs::read(folder.join("model-00002-of-00002.safetensors")).unwrap(), b"second");
    assert!(hub.take_requests().iter().all(|path| !path.contains("00001")), "the first shard was in the cache");
}

#[test]
fn a_broken_download_continues() {
    let weights: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
    let path = "/geese/bean/resolve/main/model.safetensors";
    let hub = Hub::serve(&[("/geese/bean/resolve/main/config.json", b"{}"), (path, &weights)], Some(path));
    let home = TestHome::new("broken");
    let folder = resolve_at(&home, &home.settings(&hub.endpoint), "geese/bean").unwrap();
    assert!(std::fs::read(folder.join(WEIGHTS)).unwrap() == weights);
    let of_weights = hub.take_requests().iter().filter(|request| request.starts_with("/store")).count();
    assert_eq!(of_weights, 4, "length and data, twice");
}

#[test]
fn a_gated_model_needs_a_token() {
    let files: [(&str, &[u8]); 2] =
        [("/gated/swan/resolve/main/config.json", b"{}"), ("/gated/swan/resolve/main/model.safetensors", b"w")];
    let hub = Hub::serve(&files, None);
    let home = TestHome::new("gated");
    let settings = home.settings(&hub.endpoint);
    assert_eq!(
        resolve_at(&home, &settings, "gated/swan").unwrap_err().to_string(),
        "model gated/swan: config.json: access refused (status 401); check the spelling of the id, and for a private or \
         gated model set HF_TOKEN to a token that may read it"
    );
    let settings = HubSettings { token: Some("hf_secret".to_owned()), ..settings };
    assert!(resolve_at(&home, &settings, "gated/swan").unwrap().join(WEIGHTS).exists());
}

#[test]
fn errors_say_what_was_looked_for_and_what_to_do() {
    let home = TestHome::new("errors");
    let hub = Hub::serve(&[("/geese/bare/resolve/main/config.json", b"{}")], None);
    let settings = home.settings(&hub.endpoint);
    std::fs::write(home.0.join("model.gguf"), "GGUF").unwrap();
    let message = |settings: &HubSettings, reference: &str| {
        let message = resolve_at(&home, settings, reference).unwrap_err().to_string();
        message.replace(home.0.to_str().unwrap(), "HOME").replace(&hub.endpoint, "HUB")
    };
    assert_eq!(
        message(&settings, "../no/such"),
        "model \"../no/such\": there is no folder HOME/../no/such, and it is not a hub id of the form owner/name[@revision]"
    );
    assert_eq!(
        message(&settings, "model.gguf"),
        "model \"model.gguf\": HOME/model.gguf is a file; a model is a Hugging Face folder (the import program turns a GGUF file into one)"
    );
    assert_eq!(
        message(&settings, "geese/none@v2"),
        "model geese/none: there is no folder HOME/geese/none@v2, and HUB has no config.json at revision v2; check the spelling of the id and the revision"
    );
    assert_eq!(
        message(&settings, "geese/bare"),
        "model geese/bare: neither model.safetensors nor model.safetensors.index.json at revision main; only safetensors weights are read"
    );
    assert_eq!(
        message(&HubSettings { offline: true, ..settings.clone() }, "geese/grey"),
        "model geese/grey: not complete in the cache HOME/hub, and HF_HUB_OFFLINE forbids fetching it; unset it once, or name a folder"
    );
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let unreachable = message(&home.settings(&format!("http://{closed}")), "geese/grey");
    assert!(unreachable.starts_with("model geese/grey: config.json: download failed: "), "{unreachable}");
    assert!(unreachable.ends_with(&format!("try again (HF_ENDPOINT is http://{closed})")), "{unreachable}");
}

#[test]
fn a_folder_is_used_as_it_is() {
    let home = TestHome::new("folder");
    std::fs::create_dir_all(home.0.join("owner/name")).unwrap();
    let settings = || unreachable!("a folder needs no hub");
    assert_eq!(resolve("owner/name", &home.0, settings).unwrap(), home.0.join("owner/name"));
    let absolute = home.0.join("owner");
    assert_eq!(resolve(absolute.to_str().unwrap(), Path::new("elsewhere"), settings).unwrap(), absolute);
}

#[test]
fn settings_come_from_the_variables_of_huggingface_hub() {
    let variables = HashMap::from([
        ("HF_ENDPOINT", "https://hub.example/"),
        ("HF_HOME", "/models"),
        ("HF_TOKEN", "hf_secret"),
        ("HF_HUB_OFFLINE", "True"),
    ]);
    let settings = HubSettings::from_variables(|name| variables.get(name).map(|value| (*value).to_owned()));
    assert_eq!(settings.endpoint, "https://hub.example");
    assert_eq!(settings.home, Some(PathBuf::from("/models")));
    assert_eq!(settings.token.as_deref(), Some("hf_secret"));
    assert!(settings.offline);
    let defaults = HubSettings::from_variables(|_| None);
    assert_eq!((defaults.endpoint.as_str(), defaults.offline), ("https://huggingface.co", false));
}

#[test]
fn ids_and_shard_names_cannot_leave_the_cache() {
    assert_eq!(hub_id("owner/name"), Some(("owner/name", "main")));
    assert_eq!(hub_id("owner/name@refs/pr/1"), Some(("owner/name", "refs/pr/1")));
    for wrong in ["name", "a/b/c", "/a/b", "../b", "a/..", "a/b@../../x", "a/b@", "a b/c", "./a/b"] {
        assert_eq!(hub_id(wrong), None, "{wrong}");
    }
    for wrong in ["../x.safetensors", "/x.safetensors", ".safetensors", "x.bin"] {
        assert!(shard_names(&format!("{{\"weight_map\": {{\"a\": {wrong:?}}}}}")).is_err(), "{wrong}");
    }
}
