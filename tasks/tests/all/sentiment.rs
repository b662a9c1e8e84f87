use echelon_tasks::reward::{Lexicon, RuleConfig, SentimentRule};
use serde_json::Value;

use crate::{Folder, golden, requests};

/// The Python package rounds to 4 decimals: that is the whole difference allowed.
#[test]
fn compound_scores_equal_the_python_packages() {
    let rule = SentimentRule::new(Lexicon::read(&golden("sentiment_lexicon.txt")).unwrap());
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(golden("sentiment.json")).unwrap()).unwrap();
    assert!(cases.len() > 200);
    for case in &cases {
        let (text, expected) = (case["text"].as_str().unwrap(), case["compound"].as_f64().unwrap());
        let found = rule.compound(text);
        assert!((found - expected).abs() <= 5.000_001e-5, "{text:?}: {found}, expected {expected}");
    }
}

#[test]
fn the_rule_scores_the_response_alone() {
    let rule = RuleConfig::Sentiment { lexicon: golden("sentiment_lexicon.txt") }.build().unwrap();
    let mut requests = requests(2);
    requests[0].prompt = "awful".to_owned();
    requests[1].response = "great".to_owned();
    let scores = rule.score(&requests).unwrap();
    assert_eq!(scores[0], 0.0);
    assert!((scores[1] - 3.1 / (3.1_f64 * 3.1 + 15.0).sqrt()).abs() < 1e-12);
}

#[test]
fn a_damaged_lexicon_is_named_with_its_line() {
    let folder = Folder::new();
    for (content, problem) in [
        ("good\t2.0\nbad -2.0\n", ":2: expected a word, a tab and a number, found \"bad -2.0\""),
        ("good\ttwo\n", ":1: expected a word, a tab and a number, found \"good\\ttwo\""),
        ("good\tNaN\n", ":1: expected a word, a tab and a number, found \"good\\tNaN\""),
        ("\n\n", ":1: the lexicon has no words"),
    ] {
        let path = folder.write("words.txt", content);
        let message = Lexicon::read(&path).unwrap_err().to_string();
        assert_eq!(message, format!("{}{problem}", path.display()));
    }
    let message = Lexicon::read(&folder.0.join("none.txt")).unwrap_err().to_string();
    assert!(message.starts_with("cannot read lexicon ") && message.contains("none.txt: "), "{message}");
}
