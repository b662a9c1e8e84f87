//! Reward servers on the loopback interface.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use echelon_tasks::reward::{RewardSource, UrlConfig, UrlReward};
use serde_json::{Value, json};

use crate::requests;

/// A server that answers its n-th request as `answer` says: with raw bytes, given n (from 0) and the body.
struct Server {
    url: String,
    bodies: Arc<Mutex<Vec<Value>>>,
}

impl Server {
    fn new(answer: impl Fn(usize, &Value) -> Vec<u8> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/score", listener.local_addr().unwrap());
        let bodies = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&bodies);
        thread::spawn(move || {
            for (index, stream) in listener.incoming().enumerate() {
                let mut stream = stream.unwrap();
                let body = read_body(&stream);
                seen.lock().unwrap().push(body.clone());
                let _gone = stream.write_all(&answer(index, &body));
            }
        });
        Self { url, bodies }
    }

    fn num_requests(&self) -> usize {
        self.bodies.lock().unwrap().len()
    }
}

fn read_body(stream: &TcpStream) -> Value {
    let mut reader = BufReader::new(stream);
    let (mut length, mut line) = (0, String::new());
    while reader.read_line(&mut line).unwrap() > 2 {
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        assert!(!lower.starts_with("content-type:") || lower.contains("application/json"));
        line.clear();
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    serde_json::from_slice(&body).unwrap()
}

fn reply(status: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len()).into_bytes()
}

fn quick() -> UrlConfig {
    UrlConfig { timeout: Duration::from_secs(5), first_pause: Duration::from_millis(10), ..UrlConfig::default() }
}

fn source(url: &str) -> UrlReward {
    UrlReward::new(url, quick()).unwrap()
}

/// A good server: each reward is the number in its query, and a log that is the number of queries.
fn good(body: &Value) -> Vec<u8> {
    let queries = body["query"].as_array().unwrap();
    let number = |query: &Value| query.as_str().unwrap().split('r').nth(1).unwrap().parse::<f64>().unwrap();
    let rewards: Vec<f64> = queries.iter().map(number).collect();
    let logs = json!({"count": queries.len(), "list": [1, 2], "note": "text"});
    reply("200 OK", &json!({"rewards": rewards, "scores": rewards, "extra_logs": logs}).to_string())
}

/// The error a server's answer gives, with its URL shown as URL, and how often it was asked.
fn refused(answer: impl Fn(usize, &Value) -> Vec<u8> + Send + 'static) -> (String, usize) {
    let server = Server::new(answer);
    let message = source(&server.url).score(&requests(2)).unwrap_err().to_string();
    (message.replace(&server.url, "URL"), server.num_requests())
}

#[test]
fn the_contract() {
    let server = Server::new(|_, body| good(body));
    let source = source(&server.url);
    assert_eq!(source.score(&requests(3)).unwrap(), [0.0, 1.0, 2.0]);
    let expected =
        json!({"query": ["p0 r0", "p1 r1", "p2 r2"], "prompts": ["p0", "p1", "p2"], "labels": ["0", "1", null]});
    assert_eq!(*server.bodies.lock().unwrap(), [expected]);
    assert_eq!(source.take_metrics(), [("reward/count".to_owned(), 3.0), ("reward/list".to_owned(), 1.5)]);
    assert!(source.score(&[]).unwrap().is_empty());
    assert_eq!(server.num_requests(), 1);
}

#[test]
fn several_servers_share_evenly_and_in_order() {
    let servers: Vec<Server> = (0..3).map(|_| Server::new(|_, body| good(body))).collect();
    let urls: Vec<&str> = servers.iter().map(|server| server.url.as_str()).collect();
    for count in [1, 2, 3, 7, 10] {
        let expected: Vec<f64> = (0..count).map(f64::from).collect();
        assert_eq!(source(&urls.join(", ")).score(&requests(count as usize)).unwrap(), expected);
    }
    let lengths = |server: &Server| -> Vec<usize> {
        server.bodies.lock().unwrap().iter().map(|body| body["query"].as_array().unwrap().len()).collect()
    };
    let last: Vec<usize> = servers.iter().map(|server| *lengths(server).last().unwrap()).collect();
    assert_eq!(last, [3, 3, 4]);
}

#[test]
fn a_passing_failure_is_tried_again() {
    for failure in ["500 Internal Server Error", "503 Service Unavailable", "429 Too Many Requests"] {
        let server = Server::new(move |index, body| if index < 2 { reply(failure, "later") } else { good(body) });
        assert_eq!(source(&server.url).score(&requests(2)).unwrap(), [0.0, 1.0]);
        assert_eq!(server.num_requests(), 3);
    }
    let cut = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{\"rewards\"";
    let server = Server::new(move |index, body| if index == 0 { cut.to_vec() } else { good(body) });
    assert_eq!(source(&server.url).score(&requests(2)).unwrap(), [0.0, 1.0]);
    assert_eq!(server.num_requests(), 2);
}

#[test]
fn a_lasting_failure_names_url_attempt_request_and_answer() {
    let (message, asked) = refused(|_, _| reply("500 Internal Server Error", "Traceback: out of memory"));
    let expected = "reward server URL: attempt 5 of 5, 2 requests, the first with prompt \"p0\": \
                    status 500 Internal Server Error: not a success; body: \"Traceback: out of memory\"";
    assert_eq!((message.as_str(), asked), (expected, 5));

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let message = source(&url).score(&requests(2)).unwrap_err().to_string();
    assert!(message.starts_with(&format!("reward server {url}: attempt 5 of 5, 2 requests")), "{message}");
    assert!(message.contains("no answer: "), "{message}");
}

#[test]
fn an_answer_that_is_wrong_is_final() {
    for (body, problem) in [
        ("<html>", "not JSON: expected value at line 1 column 1; body: \"<html>\""),
        (
            "{\"rewards\": [NaN, 1]}",
            "not JSON: expected value at line 1 column 14; body: \"{\\\"rewards\\\": [NaN, 1]}\"",
        ),
        ("{\"reward\": [1, 2]}", "no \"rewards\" in the answer; body: "),
        ("[1, 2]", "no \"rewards\" in the answer; body: "),
        ("{\"rewards\": 1}", "\"rewards\" is not a list; body: "),
        ("{\"rewards\": [1]}", "2 requests, 1 rewards; body: "),
        ("{\"rewards\": [1, 2, 3]}", "2 requests, 3 rewards; body: "),
        ("{\"rewards\": [1, null]}", "reward 2 of 2 is null, not a finite number; body: "),
        ("{\"rewards\": [\"1\", 2]}", "reward 1 of 2 is \"1\", not a finite number; body: "),
        ("{\"rewards\": [[1], [2]]}", "reward 1 of 2 is [1], not a finite number; body: "),
        ("{\"rewards\": [1e999, 2]}", "not JSON: number out of range"),
        ("", "not JSON: EOF while parsing a value at line 1 column 0; body: \"\""),
    ] {
        let (message, asked) = refused(move |_, _| reply("200 OK", body));
        let start = format!(
            "reward server URL: attempt 1 of 5, 2 requests, the first with prompt \"p0\": status 200 OK: {problem}"
        );
        assert!(message.starts_with(&start), "{body}: {message}");
        assert_eq!(asked, 1);
    }
    for status in ["404 Not Found", "302 Found", "400 Bad Request"] {
        let (message, asked) = refused(move |_, _| reply(status, "no"));
        assert!(message.contains(&format!("status {status}: not a success; body: \"no\"")), "{message}");
        assert_eq!(asked, 1);
    }
}

#[test]
fn a_slow_server_is_a_timeout() {
    let server = Server::new(|_, body| {
        thread::sleep(Duration::from_secs(3));
        good(body)
    });
    let config = UrlConfig {
        attempts: 2,
        timeout: Duration::from_millis(200),
        first_pause: Duration::from_millis(10),
        ..quick()
    };
    let start = Instant::now();
    let message = UrlReward::new(&server.url, config).unwrap().score(&requests(1)).unwrap_err().to_string();
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert!(message.contains("attempt 2 of 2, 1 requests") && message.contains("timeout"), "{message}");
}

#[test]
fn an_endless_answer_is_cut_off() {
    let server = Server::new(|_, _| reply("200 OK", &format!("{{\"rewards\": [{}]}}", "1, ".repeat(100_000))));
    let config = UrlConfig { max_response_bytes: 10_000, ..quick() };
    let message = UrlReward::new(&server.url, config).unwrap().score(&requests(1)).unwrap_err().to_string();
    assert!(message.contains("attempt 1 of 5") && message.contains("an answer longer than 10000 bytes"), "{message}");
}

#[test]
fn long_prompts_and_bodies_are_cut_in_messages() {
    let server = Server::new(|_, _| reply("400 Bad Request", &"x".repeat(100_000)));
    let mut requests = requests(1);
    requests[0].prompt = "é".repeat(50_000);
    let message = source(&server.url).score(&requests).unwrap_err().to_string();
    assert!(message.len() < 1000 && message.contains('…'), "{message}");
}

#[test]
fn urls_that_are_none_are_refused() {
    for urls in ["", " , ", "localhost:5000/score", "http://", "ftp://host/x", "http://a,b"] {
        let message = UrlReward::new(urls, quick()).err().map(|error| error.to_string());
        assert!(message.as_ref().is_some_and(|message| message.starts_with("rule \"url\": ")), "{urls:?}: {message:?}");
    }
}
