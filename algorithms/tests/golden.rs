//! Golden cases: every number of PPO's maths against an independent reference, value and gradient.
//!
//! Reads `tests/golden/*.json` of the repository and every file of `$ECHELON_GOLDEN_DIR`; the format is
//! described in `tests/golden/README.md`. The runner itself is tested too: a falsified case must fail.

use std::cell::RefCell;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

use echelon_algorithms::bradley_terry::bradley_terry;
use echelon_algorithms::gae::{explained_variance, gae};
use echelon_algorithms::kl::{KlController, KlEstimator, kl_estimate};
use echelon_algorithms::losses::{PolicyClip, entropy_loss, kl_loss, policy_loss, value_loss};
use echelon_algorithms::reward_shaping::{clip_scores, normalize_scores, penalize_missing_eos, token_rewards};
use echelon_algorithms::schedule::{Decay, LrSchedule};
use echelon_algorithms::whiten::{whiten, whiten_mean_only};
use echelon_schema::Choice;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tch::{Kind, Tensor};

const TOLERANCE: f64 = 1e-6;

#[test]
fn the_repository_cases_hold() {
    let num_cases = check_folder(&repository_folder()).unwrap_or_else(|error| panic!("{error}"));
    assert!(num_cases >= 100, "only {num_cases} cases were found");
}

#[test]
fn the_cases_of_the_environment_hold() {
    if let Some(folder) = std::env::var_os("ECHELON_GOLDEN_DIR") {
        check_folder(Path::new(&folder)).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn the_readme_is_true() {
    let readme = std::fs::read_to_string(repository_folder().join("README.md")).unwrap();
    let (_, rest) = readme.split_once("```json\n").expect("an example");
    let (example, _) = rest.split_once("```").expect("the example's end");
    assert_eq!(check_text(example), Ok(1));
    for (name, _) in FUNCTIONS {
        assert!(readme.contains(&format!("\n| `{name}` |")), "{name} is not documented");
    }
}

#[test]
fn every_falsified_number_is_found() {
    let mut num_falsified = 0;
    for path in golden_files(&repository_folder()).unwrap() {
        for case in read_cases(&std::fs::read_to_string(path).unwrap()).unwrap() {
            for key in ["expected", "expected_gradient"] {
                for (name, table) in case.get(key).and_then(Value::as_object).into_iter().flatten() {
                    let mut falsified = case.clone();
                    if falsify_last_number(&mut falsified[key][name]) {
                        let error = check_case(&falsified).expect_err("a falsified case passed");
                        assert!(error.contains(name.as_str()), "{error} does not name {name} = {table}");
                        num_falsified += 1;
                    }
                }
            }
        }
    }
    assert!(num_falsified >= 200, "only {num_falsified} tables were falsified");
}

#[test]
fn single_precision_agrees_and_stays_single() {
    for path in golden_files(&repository_folder()).unwrap() {
        for case in read_cases(&std::fs::read_to_string(path).unwrap()).unwrap() {
            let case = Case::deserialize(&case).unwrap();
            let outputs = Call::new(&case, Kind::Float).run().unwrap();
            for (name, output) in outputs {
                let is_tensor = ["kl", "loss", "rewards", "advantages", "returns", "scores"].contains(&name);
                assert!(!is_tensor || output.kind() == Kind::Float, "{}: {name} is promoted", case.name);
                let Some(expected) = case.expected.get(name) else {
                    continue;
                };
                let expected = Table::parse(expected).unwrap();
                let close = |(&actual, expected): (&f64, &Option<f64>)| {
                    expected.is_none_or(|e| (actual - e).abs() <= 1e-3 * e.abs().max(1.0))
                };
                let actual = numbers(&output);
                assert!(actual.iter().zip(&expected.leaves).all(close), "{}: {name} {actual:?}", case.name);
            }
        }
    }
}

#[test]
fn an_unknown_function_lists_the_known_ones() {
    let error = check_text(r#"{"name": "x", "function": "gea", "inputs": {}, "expected": {"a": 1}}"#).unwrap_err();
    assert!(
        error.starts_with("case \"x\": unknown function \"gea\"; known are adaptive_kl, bradley_terry,"),
        "{error}"
    );
    assert!(FUNCTIONS.iter().all(|(name, _)| error.contains(name)), "{error}");
}

#[test]
fn malformed_cases_are_refused_by_name() {
    let whiten = |inputs: &str, rest: &str| {
        check_text(&format!(r#"[{{"name": "x", "function": "whiten", "inputs": {{{inputs}}}, {rest}}}]"#)).unwrap_err()
    };
    let good = r#""advantages": [[1, 2]], "response_mask": [[true, 1]]"#;
    let expected = r#""expected": {"advantages": [[-1, 1]]}"#;
    assert_eq!(
        check_text(&format!(r#"[{{"name": "x", "function": "whiten", "inputs": {{{good}}}, {expected}}}]"#)),
        Ok(1)
    );

    assert!(check_text("[]").unwrap_err().contains("no case"));
    assert!(check_text("[NaN]").unwrap_err().contains("not JSON"));
    assert!(whiten(good, r#""expected": {}"#).contains("nothing is expected"));
    assert!(whiten(good, r#""expected": {"advantages": [[null, null]]}"#).contains("nothing is expected"));
    assert!(
        whiten(good, r#""expected": {"advantage": [[-1, 1]]}"#)
            .contains("no output \"advantage\"; known are advantages")
    );
    assert!(whiten(good, r#""expected": {"advantages": [[-1], [1]]}"#).contains("shape [2, 1], found [1, 2]"));
    assert!(whiten(good, r#""expected": {"advantages": [[-1, "one"]]}"#).contains("\"one\" is no number"));
    assert!(whiten(r#""advantages": [[1, 2]]"#, expected).contains("no input \"response_mask\""));
    assert!(
        whiten(r#""advantages": [[1, 2], [3]], "response_mask": [[1, 1]]"#, expected)
            .contains("rows of unequal length")
    );
    assert!(
        whiten(r#""advantages": [[1, 2]], "response_mask": [[1]]"#, expected).contains("shape [1, 1], found [1, 2]")
    );
    assert!(whiten(&format!(r#"{good}, "extra": 1"#), expected).contains("unknown input \"extra\""));
    assert!(whiten(good, &format!(r#""parameters": {{"std": 1}}, {expected}"#)).contains("unknown parameter \"std\""));
    assert!(
        whiten(good, &format!(r#""parameters": {{"mean_only": 1}}, {expected}"#)).contains("parameter \"mean_only\"")
    );
    assert!(whiten(good, r#""expectd": {}"#).contains("unknown field `expectd`"));
    assert!(
        whiten(good, r#""expected_gradient": {"advantages": [[0, 0]]}"#).contains("no gradient for \"advantages\"")
    );
}

#[test]
fn a_folder_without_cases_is_an_error() {
    let empty = repository_folder().join("..").join("..").join("core").join("src");
    assert!(check_folder(&empty).unwrap_err().contains("no .json file"));
    assert!(check_folder(&empty.join("missing")).is_err());
}

// ---------------------------------------------------------------- files

fn repository_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")
}

fn golden_files(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = std::fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    if files.is_empty() { Err(format!("{}: no .json file", folder.display())) } else { Ok(files) }
}

fn check_folder(folder: &Path) -> Result<usize, String> {
    let mut num_cases = 0;
    for path in golden_files(folder)? {
        let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        num_cases += check_text(&text).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(num_cases)
}

fn check_text(text: &str) -> Result<usize, String> {
    let cases = read_cases(text)?;
    cases.iter().try_for_each(check_case)?;
    Ok(cases.len())
}

/// The cases of a document: `{"format": …, "cases": […]}`, a bare list, or one case.
fn read_cases(text: &str) -> Result<Vec<Value>, String> {
    let document: Value = serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))?;
    if document.get("format").is_some_and(|format| format != "echelon-golden-1") {
        return Err(format!("format {} is not \"echelon-golden-1\"", document["format"]));
    }
    let cases = match document {
        Value::Array(cases) => cases,
        Value::Object(mut object) => match object.remove("cases") {
            Some(Value::Array(cases)) => cases,
            Some(_) => return Err("\"cases\" is no list".to_owned()),
            None => vec![Value::Object(object)],
        },
        _ => return Err("neither a list nor an object".to_owned()),
    };
    if cases.is_empty() { Err("no case".to_owned()) } else { Ok(cases) }
}

// ---------------------------------------------------------------- one case

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    function: String,
    inputs: Map<String, Value>,
    #[serde(default)]
    parameters: Map<String, Value>,
    #[serde(default)]
    expected: Map<String, Value>,
    #[serde(default)]
    expected_gradient: Map<String, Value>,
}

fn check_case(case: &Value) -> Result<(), String> {
    let case = Case::deserialize(case).map_err(|error| format!("a case is malformed: {error}"))?;
    compare_case(&case).map_err(|error| format!("case {:?}: {error}", case.name))
}

fn compare_case(case: &Case) -> Result<(), String> {
    let outputs = Call::new(case, Kind::Double).run()?;
    let mut num_compared = 0;
    for (name, expected) in &case.expected {
        let known = || outputs.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        let (_, output) = outputs
            .iter()
            .find(|(known, _)| known == name)
            .ok_or_else(|| format!("no output {name:?}; known are {}", known()))?;
        num_compared += compare(expected, output).map_err(|error| format!("{name}: {error}"))?;
    }
    for (name, expected) in &case.expected_gradient {
        let gradient = Call::gradient(case, name)?;
        num_compared += compare(expected, &gradient).map_err(|error| format!("gradient of {name}: {error}"))?;
    }
    if num_compared == 0 { Err("nothing is expected".to_owned()) } else { Ok(()) }
}

/// Compares all numbers but nulls and returns how many there were.
fn compare(expected: &Value, actual: &Tensor) -> Result<usize, String> {
    let expected = Table::parse(expected)?;
    if expected.shape != actual.size() {
        return Err(format!("expected shape {:?}, found {:?}", expected.shape, actual.size()));
    }
    for (position, (expected, actual)) in expected.leaves.iter().zip(numbers(actual)).enumerate() {
        let Some(expected) = *expected else { continue };
        let equal = expected == actual || (expected.is_nan() && actual.is_nan());
        let close = (expected - actual).abs() <= TOLERANCE; // false for NaN
        if !equal && !close {
            return Err(format!("number {position} in reading order: expected {expected}, found {actual}"));
        }
    }
    Ok(expected.leaves.iter().flatten().count())
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.detach().to_kind(Kind::Double).contiguous().view(-1)).expect("a flat tensor of doubles")
}

/// A number or nested lists of numbers; `None` where null says "not compared".
struct Table {
    shape: Vec<i64>,
    leaves: Vec<Option<f64>>,
}

impl Table {
    fn parse(value: &Value) -> Result<Self, String> {
        let leaf = |number| Ok(Self { shape: vec![], leaves: vec![number] });
        match value {
            Value::Null => leaf(None),
            Value::Bool(flag) => leaf(Some(f64::from(*flag))),
            Value::Number(number) => leaf(number.as_f64()),
            Value::String(text) => match text.as_str() {
                "nan" => leaf(Some(f64::NAN)),
                "inf" => leaf(Some(f64::INFINITY)),
                "-inf" => leaf(Some(f64::NEG_INFINITY)),
                _ => Err(format!("{text:?} is no number")),
            },
            Value::Array(rows) => {
                let rows = rows.iter().map(Self::parse).collect::<Result<Vec<_>, _>>()?;
                let inner = rows.first().map_or(vec![], |row| row.shape.clone());
                if rows.iter().any(|row| row.shape != inner) {
                    return Err("rows of unequal length".to_owned());
                }
                let shape = [vec![rows.len() as i64], inner].concat();
                Ok(Self { shape, leaves: rows.into_iter().flat_map(|row| row.leaves).collect() })
            }
            Value::Object(_) => Err("an object is no table of numbers".to_owned()),
        }
    }
}

/// Changes the last number of a table; false if it holds none.
fn falsify_last_number(table: &mut Value) -> bool {
    match table {
        Value::Array(rows) => rows.iter_mut().rev().any(falsify_last_number),
        Value::Number(number) => {
            let number = number.as_f64().unwrap();
            *table = Value::from(number + 1e-5 * number.abs().max(1.0));
            true
        }
        _ => false,
    }
}

// ---------------------------------------------------------------- the functions

type Outputs = Vec<(&'static str, Tensor)>;
type Function = fn(&Call) -> Result<Outputs, String>;

/// What a case may name, in alphabetical order.
const FUNCTIONS: &[(&str, Function)] = &[
    ("adaptive_kl", |call| {
        let (kl, num_responses) = (call.tensor("kl")?, call.like("num_responses", "kl")?);
        let mut controller =
            KlController::adaptive(call.number("kl_coef")?, call.number("kl_target")?, call.number("kl_horizon")?);
        let coefs: Vec<f64> = numbers(&kl)
            .into_iter()
            .zip(numbers(&num_responses))
            .map(|(kl, num_responses)| {
                controller.update(kl, num_responses as usize);
                controller.coef()
            })
            .collect();
        Ok(vec![("kl_coef", Tensor::from_slice(&coefs))])
    }),
    ("bradley_terry", |call| {
        let pairs = bradley_terry(&call.tensor("chosen")?, &call.like("rejected", "chosen")?);
        Ok(vec![("loss", pairs.sum), ("num_correct", pairs.num_correct)])
    }),
    ("clip_scores", |call| {
        let range = call.parameter("clip_range", Some((-10.0, 10.0)))?;
        Ok(vec![("scores", clip_scores(&call.tensor("scores")?, range))])
    }),
    ("entropy_loss", |call| {
        Ok(vec![("loss", entropy_loss(&call.tokens("entropy")?, &call.mask()?, call.number("entropy_coef")?))])
    }),
    ("explained_variance", |call| {
        let explained = explained_variance(&call.tokens("values")?, &call.tokens("returns")?, &call.mask()?);
        Ok(vec![("explained_variance", Tensor::from(explained))])
    }),
    ("gae", |call| {
        let (gamma, gae_lambda) = (call.parameter("gamma", Some(1.0))?, call.parameter("gae_lambda", Some(1.0))?);
        let (rewards, values) = (call.tokens("rewards")?, call.tokens("values")?);
        let (advantages, returns) = gae(&rewards, &values, &call.mask()?, gamma, gae_lambda);
        Ok(vec![("advantages", advantages), ("returns", returns)])
    }),
    ("kl_estimate", |call| {
        let (logprobs, ref_logprobs) = (call.tokens("logprobs")?, call.tokens("ref_logprobs")?);
        Ok(vec![("kl", kl_estimate(&logprobs, &ref_logprobs, &call.mask()?, call.kl_estimator()?))])
    }),
    ("kl_loss", |call| {
        let (logprobs, ref_logprobs) = (call.tokens("logprobs")?, call.tokens("ref_logprobs")?);
        let loss = kl_loss(&logprobs, &ref_logprobs, &call.mask()?, call.kl_estimator()?, call.number("kl_coef")?);
        Ok(vec![("loss", loss)])
    }),
    ("lr_schedule", |call| {
        let schedule = LrSchedule {
            decay: call.decay()?,
            warmup_steps: call.parameter("warmup_steps", None)?,
            total_steps: call.parameter("total_steps", None)?,
            min_lr_ratio: call.parameter("min_lr_ratio", Some(0.0))?,
        };
        let (lr, steps) = (call.number("lr")?, numbers(&call.tensor("steps")?));
        let rates: Vec<f64> = steps.into_iter().map(|step| lr * schedule.factor(step as usize)).collect();
        Ok(vec![("lr", Tensor::from_slice(&rates))])
    }),
    ("missing_eos_penalty", |call| {
        let truncated = call.like("truncated", "scores")?.to_kind(Kind::Bool);
        let penalty = call.number("missing_eos_penalty")?;
        Ok(vec![("scores", penalize_missing_eos(&call.tensor("scores")?, &truncated, penalty))])
    }),
    ("normalize_scores", |call| {
        let scores = normalize_scores(&call.tensor("scores")?, call.number("mean")?, call.number("std")?);
        Ok(vec![("scores", scores)])
    }),
    ("policy_loss", |call| {
        let low = call.parameter("policy_clip", Some(0.2))?;
        let high = call.parameter::<Option<f64>>("policy_clip_high", Some(None))?.unwrap_or(low);
        let clip = PolicyClip { low, high, dual: call.parameter("dual_clip", Some(None))? };
        let (logprobs, old_logprobs) = (call.tokens("logprobs")?, call.tokens("old_logprobs")?);
        let loss = policy_loss(&logprobs, &old_logprobs, &call.tokens("advantages")?, &call.mask()?, clip);
        Ok(vec![
            ("loss", loss.sum),
            ("num_clipped", loss.sums.num_clipped),
            ("ppo_kl_sum", loss.sums.ppo_kl),
            ("approx_kl_sum", loss.sums.approx_kl),
            ("ratio_sum", loss.sums.ratio),
        ])
    }),
    ("token_rewards", |call| {
        let (kl, scores) = (call.tokens("kl")?, call.tensor("scores")?);
        if scores.size() != kl.size()[..1] {
            return Err(format!("input \"scores\": expected shape {:?}, found {:?}", &kl.size()[..1], scores.size()));
        }
        Ok(vec![("rewards", token_rewards(&kl, &scores, &call.mask()?, call.number("kl_coef")?))])
    }),
    ("value_loss", |call| {
        let (values, old_values) = (call.tokens("values")?, call.tokens("old_values")?);
        let value_clip = call.parameter("value_clip", Some(None))?;
        let loss = value_loss(&values, &old_values, &call.tokens("returns")?, &call.mask()?, value_clip);
        Ok(vec![("loss", loss.sum), ("num_clipped", loss.num_clipped)])
    }),
    ("whiten", |call| {
        let whiten = if call.parameter("mean_only", Some(false))? { whiten_mean_only } else { whiten };
        Ok(vec![("advantages", whiten(&call.tokens("advantages")?, &call.mask()?))])
    }),
];

/// Inputs a gradient can be expected for, by function.
const DIFFERENTIABLE: &[(&str, &[&str])] = &[
    ("bradley_terry", &["chosen", "rejected"]),
    ("entropy_loss", &["entropy"]),
    ("kl_estimate", &["logprobs", "ref_logprobs"]),
    ("kl_loss", &["logprobs"]),
    ("policy_loss", &["logprobs"]),
    ("value_loss", &["values"]),
];

/// A case about to be run in one floating-point kind. It remembers what was read, to refuse what was not.
struct Call<'a> {
    case: &'a Case,
    kind: Kind,
    /// The input whose gradient is wanted, once it is made.
    leaf: RefCell<(Option<&'a str>, Option<Tensor>)>,
    read: RefCell<HashSet<String>>,
}

impl<'a> Call<'a> {
    fn new(case: &'a Case, kind: Kind) -> Self {
        Self { case, kind, leaf: RefCell::default(), read: RefCell::default() }
    }

    fn run(&self) -> Result<Outputs, String> {
        let (_, function) = FUNCTIONS.iter().find(|(name, _)| *name == self.case.function).ok_or_else(|| {
            let known: Vec<_> = FUNCTIONS.iter().map(|(name, _)| *name).collect();
            format!("unknown function {:?}; known are {}", self.case.function, known.join(", "))
        })?;
        let outputs = function(self)?;
        let read = self.read.borrow();
        for (kind, given) in [("input", &self.case.inputs), ("parameter", &self.case.parameters)] {
            if let Some(name) = given.keys().find(|name| !read.contains(*name)) {
                return Err(format!("unknown {kind} {name:?}"));
            }
        }
        Ok(outputs)
    }

    /// Gradient of the sum of the first output with respect to one input.
    fn gradient(case: &'a Case, input: &'a str) -> Result<Tensor, String> {
        let differentiable = DIFFERENTIABLE.iter().find(|(function, _)| *function == case.function);
        if !differentiable.is_some_and(|(_, inputs)| inputs.contains(&input)) {
            return Err(format!("{} has no gradient for {input:?}", case.function));
        }
        let call = Self { leaf: RefCell::new((Some(input), None)), ..Self::new(case, Kind::Double) };
        let outputs = call.run()?;
        outputs[0].1.sum(Kind::Double).backward();
        let (_, leaf) = call.leaf.into_inner();
        Ok(leaf.ok_or_else(|| format!("no input {input:?}"))?.grad())
    }

    /// An input of any shape.
    fn tensor(&self, name: &str) -> Result<Tensor, String> {
        self.read.borrow_mut().insert(name.to_owned());
        let value = self.case.inputs.get(name).ok_or_else(|| format!("no input {name:?}"))?;
        let table = Table::parse(value).map_err(|error| format!("input {name:?}: {error}"))?;
        let leaves: Option<Vec<f64>> = table.leaves.into_iter().collect();
        let leaves = leaves.ok_or_else(|| format!("input {name:?}: null is no number"))?;
        let tensor = Tensor::from_slice(&leaves).view(table.shape.as_slice()).to_kind(self.kind);
        let mut leaf = self.leaf.borrow_mut();
        if leaf.0 != Some(name) {
            return Ok(tensor);
        }
        let tensor = tensor.set_requires_grad(true);
        leaf.1 = Some(tensor.shallow_clone());
        Ok(tensor)
    }

    /// An input of the same shape as another.
    fn like(&self, name: &str, other: &str) -> Result<Tensor, String> {
        let (tensor, expected) = (self.tensor(name)?, Call::new(self.case, self.kind).tensor(other)?.size());
        if tensor.size() == expected {
            Ok(tensor)
        } else {
            Err(format!("input {name:?}: expected shape {expected:?}, found {:?}", tensor.size()))
        }
    }

    /// A per-token input `[B, T]`.
    fn tokens(&self, name: &str) -> Result<Tensor, String> {
        self.like(name, "response_mask")
    }

    fn mask(&self) -> Result<Tensor, String> {
        let mask = self.tensor("response_mask")?.to_kind(Kind::Bool);
        if mask.dim() == 2 { Ok(mask) } else { Err(format!("input \"response_mask\" has shape {:?}", mask.size())) }
    }

    fn parameter<T: DeserializeOwned>(&self, name: &str, default: Option<T>) -> Result<T, String> {
        self.read.borrow_mut().insert(name.to_owned());
        match self.case.parameters.get(name) {
            Some(value) => T::deserialize(value).map_err(|error| format!("parameter {name:?}: {error}")),
            None => default.ok_or_else(|| format!("no parameter {name:?}")),
        }
    }

    fn number(&self, name: &str) -> Result<f64, String> {
        self.parameter(name, None)
    }

    /// By transformers' name, which may be longer than ours.
    fn decay(&self) -> Result<Decay, String> {
        let name: String = self.parameter("schedule", None)?;
        let known = Decay::ALL.iter().find(|(_, word, _)| name.starts_with(word));
        known.map(|(decay, ..)| *decay).ok_or_else(|| format!("no schedule {name:?}"))
    }

    fn kl_estimator(&self) -> Result<KlEstimator, String> {
        self.parameter("kl_estimator", None)
    }
}
