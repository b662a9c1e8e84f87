//! How positive a response sounds: VADER's rules over a lexicon from a file.
//!
//! VADER (Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
//! ICWSM 2014) sums the lexicon's valences of a text's words, changed by the words around them: boosters
//! ("very"), negation within three words, capitals, "least", a few idioms, "but", exclamation and question marks.
//! The constants and word lists are those of vaderSentiment 3.3.2 (copyright 2016 C.J. Hutto, MIT licence), which the
//! tests compare with; it rounds to 4 decimals, so the largest difference is 5e-5. Its table of emoji names is left
//! out: an emoji counts when the lexicon lists it as a word.

use std::collections::HashMap;
use std::path::Path;

use super::{RewardError, RewardRequest, RewardSource};

/// The compound score of the response, from -1 to 1; 0 for a text without words of the lexicon.
#[derive(Debug, Clone)]
pub struct SentimentRule {
    lexicon: Lexicon,
}

/// Valences of words, usually from -4 to 4.
#[derive(Debug, Clone)]
pub struct Lexicon {
    valences: HashMap<String, f64>,
}

impl Lexicon {
    /// Reads a lexicon in the format of VADER's: a line per word, fields parted by tabs, of which the first is
    /// the word in lower case and the second its valence. Further fields and blank lines are passed over.
    ///
    /// # Errors
    /// A file that cannot be read, a line without a valence, or no word at all.
    pub fn read(path: &Path) -> Result<Self, RewardError> {
        let read = std::fs::read_to_string(path);
        let text = read.map_err(|source| RewardError::ReadLexicon { path: path.to_owned(), source })?;
        let wrong = |line, message| RewardError::Lexicon { path: path.to_owned(), line, message };
        let mut valences = HashMap::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() {
                continue;
            }
            let Some((word, valence)) = parse_entry(line) else {
                return Err(wrong(index + 1, format!("expected a word, a tab and a number, found {line:?}")));
            };
            valences.insert(word.to_owned(), valence);
        }
        if valences.is_empty() {
            return Err(wrong(1, "the lexicon has no words".to_owned()));
        }
        Ok(Self { valences })
    }
}

fn parse_entry(line: &str) -> Option<(&str, f64)> {
    let mut fields = line.split('\t');
    let (word, valence) = (fields.next()?, fields.next()?.trim().parse::<f64>().ok()?);
    (!word.is_empty() && valence.is_finite()).then_some((word, valence))
}

impl SentimentRule {
    pub fn new(lexicon: Lexicon) -> Self {
        Self { lexicon }
    }

    /// The compound score of a text, from -1 to 1.
    pub fn compound(&self, text: &str) -> f64 {
        /// Approximates the largest sum expected, squared.
        const ALPHA: f64 = 15.0;
        let sentence = Sentence::new(text, &self.lexicon);
        let mut valences: Vec<f64> = (0..sentence.words.len()).map(|at| sentence.valence(at)).collect();
        sentence.weigh_around_but(&mut valences);
        let sum: f64 = valences.iter().sum();
        let emphasized = if sum == 0.0 { 0.0 } else { sum + sum.signum() * punctuation_emphasis(text) };
        emphasized / (emphasized * emphasized + ALPHA).sqrt()
    }
}

impl RewardSource for SentimentRule {
    fn name(&self) -> String {
        "sentiment".to_owned()
    }

    fn is_per_request(&self) -> bool {
        true
    }

    fn score(&self, requests: &[RewardRequest]) -> Result<Vec<f64>, RewardError> {
        Ok(requests.iter().map(|request| self.compound(&request.response)).collect())
    }
}

const BOOST: f64 = 0.293;
const CAPITALS: f64 = 0.733;
const NEGATION: f64 = -0.74;

struct Word {
    lower: String,
    is_upper: bool,
    /// In the lexicon.
    valence: Option<f64>,
}

struct Sentence {
    words: Vec<Word>,
    /// Whether some words and not all are in capitals: only then capitals mean emphasis.
    capitals_matter: bool,
}

impl Sentence {
    fn new(text: &str, lexicon: &Lexicon) -> Self {
        let word = |token: &str| {
            let token = strip_punctuation(token);
            let lower = token.to_lowercase();
            let valence = lexicon.valences.get(&lower).copied();
            Word { lower, is_upper: is_upper(token), valence }
        };
        let words: Vec<Word> = text.split_whitespace().map(word).collect();
        let num_upper = words.iter().filter(|word| word.is_upper).count();
        Self { capitals_matter: num_upper > 0 && num_upper < words.len(), words }
    }

    /// The word `back` places before `at`.
    fn before(&self, at: usize, back: usize) -> Option<&Word> {
        self.words.get(at.checked_sub(back)?)
    }

    fn is_before(&self, at: usize, back: usize, words: &[&str]) -> bool {
        self.before(at, back).is_some_and(|word| words.contains(&word.lower.as_str()))
    }

    /// The valence of word `at` among its neighbours.
    fn valence(&self, at: usize) -> f64 {
        let word = &self.words[at];
        let next = self.words.get(at + 1);
        let kind_of = word.lower == "kind" && next.is_some_and(|next| next.lower == "of");
        let Some(listed) = word.valence.filter(|_| booster(&word.lower).is_none() && !kind_of) else {
            return 0.0;
        };
        let mut valence = listed;
        if word.lower == "no" && next.is_some_and(|next| next.valence.is_some()) {
            valence = 0.0; // "no" negates the next word instead of counting itself
        }
        let after_no = self.is_before(at, 1, &["no"])
            || self.is_before(at, 2, &["no"])
            || (self.is_before(at, 3, &["no"]) && self.is_before(at, 1, &["or", "nor"]));
        if after_no {
            valence = listed * NEGATION;
        }
        if word.is_upper && self.capitals_matter {
            valence += if valence > 0.0 { CAPITALS } else { -CAPITALS };
        }
        for back in 1..=3 {
            if self.before(at, back).is_some_and(|before| before.valence.is_none()) {
                valence = self.changed_by(at, back, valence);
            }
        }
        self.changed_by_least(at, valence)
    }

    /// `valence` after the word `back` places before, which the lexicon does not have, has boosted or negated it.
    fn changed_by(&self, at: usize, back: usize, valence: f64) -> f64 {
        /// A booster counts less the further away it stands.
        const NEARNESS: [f64; 3] = [1.0, 0.95, 0.9];
        let boosted = valence + NEARNESS[back - 1] * self.boost(at, back, valence);
        let negated = self.negated(at, back, boosted);
        if back == 3 { self.idiom(at, negated) } else { negated }
    }

    fn boost(&self, at: usize, back: usize, valence: f64) -> f64 {
        let Some((word, boost)) = self.before(at, back).and_then(|word| Some((word, booster(&word.lower)?))) else {
            return 0.0;
        };
        let boost = if valence < 0.0 { -boost } else { boost };
        let capitals = if word.is_upper && self.capitals_matter { CAPITALS } else { 0.0 };
        boost + if valence > 0.0 { capitals } else { -capitals }
    }

    fn negated(&self, at: usize, back: usize, valence: f64) -> f64 {
        let so_this = |back| self.is_before(at, back, &["so", "this"]);
        let never = self.is_before(at, back, &["never"]);
        let emphatic = match back {
            2 => never && so_this(1),
            3 => (never && so_this(2)) || so_this(1), // "so" counts without "never" here: VADER's own precedence
            _ => false,
        };
        if emphatic {
            return valence * 1.25;
        }
        let without_doubt =
            self.is_before(at, back, &["without"]) && (1..back).any(|back| self.is_before(at, back, &["doubt"]));
        let negation = self.before(at, back).is_some_and(|word| is_negation(&word.lower));
        if negation && !without_doubt { valence * NEGATION } else { valence }
    }

    fn changed_by_least(&self, at: usize, valence: f64) -> f64 {
        let least = self.before(at, 1).is_some_and(|word| word.lower == "least" && word.valence.is_none());
        if least && !self.is_before(at, 2, &["at", "very"]) { valence * NEGATION } else { valence }
    }

    /// The valence of an idiom around word `at`, which has three words before it.
    fn idiom(&self, at: usize, valence: f64) -> f64 {
        let phrase = |from: usize, to: usize| {
            let words: Option<Vec<&str>> = (from..=to).map(|at| Some(self.words.get(at)?.lower.as_str())).collect();
            words.map(|words| words.join(" "))
        };
        let behind = [(at - 1, at), (at - 2, at), (at - 2, at - 1), (at - 3, at - 1), (at - 3, at - 2)];
        let found = |(from, to)| special_case(&phrase(from, to)?);
        let mut valence = behind.into_iter().find_map(found).unwrap_or(valence);
        for ahead in [(at, at + 1), (at, at + 2)] {
            valence = found(ahead).unwrap_or(valence);
        }
        let dampeners = [(at - 3, at - 2), (at - 2, at - 1)];
        valence + dampeners.into_iter().filter_map(|(from, to)| booster(&phrase(from, to)?)).sum::<f64>()
    }

    /// Halves what stands before the first "but" and raises what stands after it by half.
    ///
    /// Like VADER, which looks a valence's place up by its value: of equal valences the first one is changed.
    fn weigh_around_but(&self, valences: &mut [f64]) {
        let Some(but) = self.words.iter().position(|word| word.lower == "but") else {
            return;
        };
        for at in 0..valences.len() {
            let value = valences[at];
            let place = valences.iter().position(|other| *other == value).unwrap_or(at);
            valences[place] *= match place.cmp(&but) {
                std::cmp::Ordering::Less => 0.5,
                std::cmp::Ordering::Equal => 1.0,
                std::cmp::Ordering::Greater => 1.5,
            };
        }
    }
}

/// The token without punctuation around it, unless that leaves two characters or fewer: then it may be an emoticon.
fn strip_punctuation(token: &str) -> &str {
    let stripped = token.trim_matches(|character: char| character.is_ascii_punctuation());
    if stripped.chars().count() <= 2 { token } else { stripped }
}

fn is_upper(token: &str) -> bool {
    token.chars().any(char::is_uppercase) && !token.chars().any(char::is_lowercase)
}

fn punctuation_emphasis(text: &str) -> f64 {
    let exclamations = text.matches('!').count().min(4) as f64 * 0.292;
    let questions = match text.matches('?').count() {
        0 | 1 => 0.0,
        count @ (2 | 3) => count as f64 * 0.18,
        _ => 0.96,
    };
    exclamations + questions
}

fn is_negation(word: &str) -> bool {
    word.contains("n't") || NEGATIONS.contains(&word)
}

fn booster(phrase: &str) -> Option<f64> {
    if BOOSTERS.contains(&phrase) { Some(BOOST) } else { DAMPENERS.contains(&phrase).then_some(-BOOST) }
}

fn special_case(phrase: &str) -> Option<f64> {
    SPECIAL_CASES.iter().find(|(known, _)| *known == phrase).map(|(_, valence)| *valence)
}

#[rustfmt::skip]
const NEGATIONS: &[&str] = &[
    "aint", "arent", "cannot", "cant", "couldnt", "darent", "didnt", "doesnt", "dont", "hadnt", "hasnt",
    "havent", "isnt", "mightnt", "mustnt", "neither", "neednt", "never", "none", "nope", "nor", "not",
    "nothing", "nowhere", "oughtnt", "shant", "shouldnt", "uhuh", "wasnt", "werent", "uh-uh", "without",
    "wont", "wouldnt", "rarely", "seldom", "despite",
];

#[rustfmt::skip]
const BOOSTERS: &[&str] = &[
    "absolutely", "amazingly", "awfully", "completely", "considerable", "considerably", "decidedly", "deeply",
    "effing", "enormous", "enormously", "entirely", "especially", "exceptional", "exceptionally", "extreme",
    "extremely", "fabulously", "flipping", "flippin", "frackin", "fracking", "fricking", "frickin",
    "frigging", "friggin", "fully", "fuckin", "fucking", "fuggin", "fugging", "greatly", "hella", "highly",
    "hugely", "incredible", "incredibly", "intensely", "major", "majorly", "more", "most", "particularly",
    "purely", "quite", "really", "remarkably", "so", "substantially", "thoroughly", "total", "totally",
    "tremendous", "tremendously", "uber", "unbelievably", "unusually", "utter", "utterly", "very",
];

#[rustfmt::skip]
const DAMPENERS: &[&str] = &[
    "almost", "barely", "hardly", "just enough", "kind of", "kinda", "kindof", "kind-of", "less", "little",
    "marginal", "marginally", "occasional", "occasionally", "partly", "scarce", "scarcely", "slight",
    "slightly", "somewhat", "sort of", "sorta", "sortof", "sort-of",
];

const SPECIAL_CASES: &[(&str, f64)] = &[
    ("the shit", 3.0),
    ("the bomb", 3.0),
    ("bad ass", 1.5),
    ("badass", 1.5),
    ("bus stop", 0.0),
    ("yeah right", -2.0),
    ("kiss of death", -1.5),
    ("to die for", 3.0),
    ("beating heart", 3.5),
];
