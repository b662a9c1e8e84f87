//! Requests and answers as bytes, for workers in other processes.
//!
//! A body is a safetensors file: its tensors are the message's tensors, the rest is JSON in its metadata. It describes
//! itself, and reading checks it: bytes of another message, or damaged ones, are an error.

use std::borrow::Cow;
use std::collections::HashMap;

use safetensors::tensor::{Dtype, View};
use safetensors::{SafeTensors, serialize};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::error::{Error, OutOfMemory, Result};
use crate::experience::Experience;
use crate::memory::MemoryReport;
use crate::role::Role;
use crate::rollout::{FinishReason, GenerationReport, Prompts, Rollout, SamplingConfig, Tokens};
use crate::verb::*;

/// What can go to another process and come back the same.
pub trait Message: Sized {
    /// Names the type in its bytes; a verb of the same worker is found by it.
    const KIND: &'static str;
    fn to_body(&self) -> Body;
    /// # Errors
    /// A field or tensor is missing or does not fit.
    fn from_body(body: &mut Body) -> Result<Self>;
}

/// A message taken apart: its tensors by name, and the rest.
#[derive(Debug, Default)]
pub struct Body {
    fields: Value,
    tensors: HashMap<String, Tensor>,
}

/// Key of the metadata that holds the fields.
const FIELDS: &str = "fields";
/// Key of the metadata that names the message.
const KIND: &str = "kind";

/// The bytes of a message.
///
/// # Panics
/// A tensor has a dtype that no message has.
pub fn encode<M: Message>(message: &M) -> Vec<u8> {
    message.to_body().to_bytes(M::KIND)
}

/// The message in `bytes`.
///
/// # Errors
/// The bytes are damaged or hold another message.
pub fn decode<M: Message>(bytes: &[u8]) -> Result<M> {
    let damaged = |cause: String| Error::Refused(format!("a `{}` message cannot be read: {cause}", M::KIND));
    let metadata = metadata(bytes).map_err(damaged)?;
    let parsed = SafeTensors::deserialize(bytes).map_err(|error| damaged(error.to_string()))?;
    let mut tensors = HashMap::new();
    for (name, view) in parsed.iter() {
        let kind = kind_of(view.dtype()).ok_or_else(|| damaged(format!("{name} is {:?}", view.dtype())))?;
        let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
        tensors.insert(name.to_string(), Tensor::f_from_data_size(view.data(), &shape, kind)?);
    }
    of_parts(|key| metadata.get(key).map(String::as_str), tensors)
}

/// The kind of the message in `bytes`, where they hold one.
pub fn kind_of_message(bytes: &[u8]) -> Option<String> {
    metadata(bytes).ok()?.remove(KIND)
}

fn metadata(bytes: &[u8]) -> std::result::Result<HashMap<String, String>, String> {
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
    Ok(header.metadata().clone().unwrap_or_default())
}

/// The message whose metadata and tensors these are.
///
/// # Errors
/// They are another message's, or something of it is missing.
pub(crate) fn of_parts<'a, M: Message>(
    metadata: impl Fn(&str) -> Option<&'a str>,
    tensors: HashMap<String, Tensor>,
) -> Result<M> {
    let damaged = |cause: String| Error::Refused(format!("a `{}` message cannot be read: {cause}", M::KIND));
    let kind = metadata(KIND).unwrap_or("nothing");
    if kind != M::KIND {
        return Err(damaged(format!("it holds `{kind}`")));
    }
    let fields = metadata(FIELDS).ok_or_else(|| damaged("it has no fields".into()))?;
    let fields = serde_json::from_str(fields).map_err(|error| damaged(error.to_string()))?;
    M::from_body(&mut Body { fields, tensors }).map_err(|error| damaged(error.to_string()))
}

impl Body {
    pub(crate) fn to_bytes(&self, kind: &str) -> Vec<u8> {
        let metadata = self.metadata(kind).map(|(key, value)| (key.to_string(), value));
        let mut tensors: Vec<(&String, Bytes)> = self.tensors.iter().map(|(name, t)| (name, Bytes::of(t))).collect();
        tensors.sort_by_key(|(name, _)| *name);
        serialize(tensors, Some(metadata.into())).expect("tensors of their own shapes and sizes")
    }

    /// What goes with the tensors of a message of `kind`.
    pub(crate) fn metadata(&self, kind: &str) -> [(&'static str, String); 2] {
        [(KIND, kind.into()), (FIELDS, self.fields.to_string())]
    }

    pub(crate) fn tensors(&self) -> &HashMap<String, Tensor> {
        &self.tensors
    }

    /// # Panics
    /// `fields` holds what JSON cannot: a map whose keys are no text.
    pub fn of(fields: impl Serialize) -> Body {
        Body { fields: serde_json::to_value(fields).expect("plain fields"), tensors: HashMap::new() }
    }

    #[must_use]
    pub fn with(mut self, name: &str, tensor: &Tensor) -> Body {
        self.tensors.insert(name.into(), tensor.shallow_clone());
        self
    }

    /// # Errors
    /// A field is missing or of another type.
    pub fn fields<T: DeserializeOwned>(&mut self) -> Result<T> {
        serde_json::from_value(self.fields.take()).map_err(|error| Error::other("fields", error))
    }

    /// # Errors
    /// There is no such tensor.
    pub fn tensor(&mut self, name: &'static str) -> Result<Tensor> {
        self.tensors.remove(name).ok_or_else(|| Error::Refused(format!("tensor `{name}` is missing")))
    }

    /// # Errors
    /// There is none of this name and shape.
    fn shaped(&mut self, name: &'static str, shape: &[i64]) -> Result<Tensor> {
        let tensor = self.tensor(name)?;
        if tensor.size() != shape {
            return Err(Error::Shape { what: name, expected: shape.to_vec(), found: tensor.size() });
        }
        Ok(tensor)
    }

    /// Numbers of any value, infinite and undefined ones too, which JSON has no words for.
    fn with_numbers<const K: usize>(self, numbers: [f64; K]) -> Body {
        self.with("numbers", &Tensor::from_slice(&numbers))
    }

    fn numbers<const K: usize>(&mut self) -> Result<[f64; K]> {
        let numbers = Vec::<f64>::try_from(self.shaped("numbers", &[K as i64])?)?;
        Ok(numbers.try_into().expect("as many as its shape says"))
    }
}

/// The bytes of a tensor, which it keeps.
struct Bytes {
    tensor: Tensor,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl Bytes {
    fn of(tensor: &Tensor) -> Bytes {
        let tensor = tensor.detach().to_device(Device::Cpu).contiguous();
        let dtype = dtype_of(tensor.kind());
        let shape = tensor.size().iter().map(|&size| size as usize).collect();
        Bytes { tensor, dtype, shape }
    }
}

impl View for Bytes {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let bytes = self.data_len();
        if bytes == 0 {
            return Cow::Borrowed(&[]);
        }
        // SAFETY: a contiguous CPU tensor owns `bytes` bytes from its data pointer, and lives as long as `self`.
        Cow::Borrowed(unsafe { std::slice::from_raw_parts(self.tensor.data_ptr() as *const u8, bytes) })
    }
    fn data_len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}

fn dtype_of(kind: Kind) -> Dtype {
    match kind {
        Kind::Float => Dtype::F32,
        Kind::Double => Dtype::F64,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Half => Dtype::F16,
        Kind::Int64 => Dtype::I64,
        Kind::Bool => Dtype::BOOL,
        other => panic!("tensors of {other:?} are part of no message"),
    }
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::F64 => Kind::Double,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
        Dtype::I64 => Kind::Int64,
        Dtype::BOOL => Kind::Bool,
        _ => return None,
    })
}

/// An error on its way to another process: what the driver acts on stays a kind, the rest are words.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Told {
    Interrupted,
    Gone(String),
    OutOfMemory(OutOfMemory),
    Refused(String),
}

/// An error as text, for [`error_from_text`].
pub fn error_to_text(error: &Error) -> String {
    let told = match error.root() {
        Error::Interrupted => Told::Interrupted,
        Error::WorkerGone(cause) => Told::Gone(cause.clone()),
        Error::OutOfMemory(found) => Told::OutOfMemory((**found).clone()),
        _ => Told::Refused(error.to_string()),
    };
    serde_json::to_string(&told).expect("an enum of texts serialises")
}

/// The error that [`error_to_text`] told; any other text is its message.
pub fn error_from_text(text: &str) -> Error {
    match serde_json::from_str(text) {
        Ok(Told::Interrupted) => Error::Interrupted,
        Ok(Told::Gone(cause)) => Error::WorkerGone(cause),
        Ok(Told::OutOfMemory(found)) => Error::OutOfMemory(Box::new(found)),
        Ok(Told::Refused(message)) => Error::Refused(message),
        Err(_) => Error::Refused(text.into()),
    }
}

#[derive(Serialize, Deserialize)]
struct Nothing {}

fn with_tokens(body: Body, tokens: &Tokens) -> Body {
    body.with("token_ids", &tokens.token_ids)
        .with("lengths", &Tensor::from_slice(&tokens.lengths))
        .with("mask", &tokens.mask)
}

fn tokens(body: &mut Body) -> Result<Tokens> {
    let lengths = Vec::<i64>::try_from(body.tensor("lengths")?)?;
    let tokens = Tokens::new(body.tensor("token_ids")?, lengths, body.tensor("mask")?)?;
    let width = tokens.token_ids.size()[1];
    match tokens.lengths.iter().find(|&&length| !(0..=width).contains(&length)) {
        Some(length) => Err(Error::Refused(format!("a row of {length} tokens in {width} columns"))),
        None => Ok(tokens),
    }
}

impl Message for Generate {
    const KIND: &'static str = "generate";
    fn to_body(&self) -> Body {
        Body::of((&self.prompts, &self.sampling))
    }
    fn from_body(body: &mut Body) -> Result<Generate> {
        let (prompts, sampling): (Prompts, SamplingConfig) = body.fields()?;
        Ok(Generate { prompts, sampling })
    }
}

impl Message for Logprobs {
    const KIND: &'static str = "logprobs";
    fn to_body(&self) -> Body {
        with_tokens(Body::of(self.role), &self.tokens)
    }
    fn from_body(body: &mut Body) -> Result<Logprobs> {
        Ok(Logprobs { role: body.fields::<Role>()?, tokens: tokens(body)? })
    }
}

impl Message for Values {
    const KIND: &'static str = "values";
    fn to_body(&self) -> Body {
        with_tokens(Body::of(Nothing {}), &self.tokens)
    }
    fn from_body(body: &mut Body) -> Result<Values> {
        Ok(Values { tokens: tokens(body)? })
    }
}

impl Message for Scores {
    const KIND: &'static str = "scores";
    fn to_body(&self) -> Body {
        with_tokens(Body::of((&self.prompts, &self.responses)), &self.tokens)
    }
    fn from_body(body: &mut Body) -> Result<Scores> {
        let (prompts, responses) = body.fields()?;
        Ok(Scores { tokens: tokens(body)?, prompts, responses })
    }
}

fn with_experience(body: Body, experience: &Experience) -> Body {
    let body = with_tokens(body, &experience.tokens)
        .with("old_logprobs", &experience.old_logprobs)
        .with("values", &experience.values)
        .with("advantages", &experience.advantages)
        .with("returns", &experience.returns);
    experience.ref_logprobs.iter().fold(body, |body, logprobs| body.with("ref_logprobs", logprobs))
}

fn experience(body: &mut Body) -> Result<Experience> {
    let tokens = tokens(body)?;
    let shape = tokens.token_ids.size();
    let ref_logprobs =
        if body.tensors.contains_key("ref_logprobs") { Some(body.shaped("ref_logprobs", &shape)?) } else { None };
    Ok(Experience {
        old_logprobs: body.shaped("old_logprobs", &shape)?,
        ref_logprobs,
        values: body.shaped("values", &shape)?,
        advantages: body.shaped("advantages", &shape)?,
        returns: body.shaped("returns", &shape)?,
        tokens,
    })
}

impl Message for UpdateActor {
    const KIND: &'static str = "update_actor";
    fn to_body(&self) -> Body {
        with_experience(Body::of((self.num_tokens, self.kl_coef)), &self.experience)
    }
    fn from_body(body: &mut Body) -> Result<UpdateActor> {
        let (num_tokens, kl_coef) = body.fields()?;
        Ok(UpdateActor { experience: experience(body)?, num_tokens, kl_coef })
    }
}

impl Message for UpdateCritic {
    const KIND: &'static str = "update_critic";
    fn to_body(&self) -> Body {
        with_experience(Body::of(self.num_tokens), &self.experience)
    }
    fn from_body(body: &mut Body) -> Result<UpdateCritic> {
        Ok(UpdateCritic { num_tokens: body.fields()?, experience: experience(body)? })
    }
}

impl Message for Learn {
    const KIND: &'static str = "learn";
    fn to_body(&self) -> Body {
        with_tokens(Body::of(self.rows_per_example).with_numbers([self.num_learned, self.lr]), &self.rows)
    }
    fn from_body(body: &mut Body) -> Result<Learn> {
        let ([num_learned, lr], rows_per_example) = (body.numbers()?, body.fields()?);
        Ok(Learn { rows: tokens(body)?, rows_per_example, num_learned, lr })
    }
}

impl Message for Assess {
    const KIND: &'static str = "assess";
    fn to_body(&self) -> Body {
        with_tokens(Body::of(Nothing {}), &self.rows)
    }
    fn from_body(body: &mut Body) -> Result<Assess> {
        Ok(Assess { rows: tokens(body)? })
    }
}

/// Messages that are fields alone.
macro_rules! plain {
    ($($message:ty = $kind:literal;)*) => {
        $(impl Message for $message {
            const KIND: &'static str = $kind;
            fn to_body(&self) -> Body {
                Body::of(self)
            }
            fn from_body(body: &mut Body) -> Result<$message> {
                body.fields()
            }
        })*
    };
}

plain! {
    Publish = "publish";
    Save = "save";
    Restore = "restore";
    Export = "export";
    Memory = "memory";
    MemoryReport = "memory_report";
    MatmulRate = "matmul_rate";
    () = "done";
    u64 = "number";
    f64 = "rate";
}

impl Message for Tensor {
    const KIND: &'static str = "tensor";
    fn to_body(&self) -> Body {
        Body::of(Nothing {}).with("tensor", self)
    }
    fn from_body(body: &mut Body) -> Result<Tensor> {
        body.tensor("tensor")
    }
}

/// The fields of a [`Rollout`] that are no tensors.
#[derive(Serialize, Deserialize)]
struct RolloutFields {
    finish_reasons: Vec<FinishReason>,
    prompts: Vec<String>,
    responses: Vec<String>,
    labels: Vec<Option<String>>,
    policy_version: u64,
    generation: GenerationReport,
}

impl Message for Rollout {
    const KIND: &'static str = "rollout";
    fn to_body(&self) -> Body {
        let fields = RolloutFields {
            finish_reasons: self.finish_reasons.clone(),
            prompts: self.prompts.clone(),
            responses: self.responses.clone(),
            labels: self.labels.clone(),
            policy_version: self.policy_version,
            generation: self.generation,
        };
        with_tokens(Body::of(fields), &self.tokens()).with("rollout_logprobs", &self.rollout_logprobs)
    }
    fn from_body(body: &mut Body) -> Result<Rollout> {
        let fields: RolloutFields = body.fields()?;
        let Tokens { token_ids, lengths, mask } = tokens(body)?;
        let rows = lengths.len();
        let texts = [fields.prompts.len(), fields.responses.len(), fields.labels.len(), fields.finish_reasons.len()];
        if texts != [rows; 4] {
            return Err(Error::Refused(format!("{rows} rows of tokens with {texts:?} texts")));
        }
        Ok(Rollout {
            rollout_logprobs: body.shaped("rollout_logprobs", &token_ids.size())?,
            token_ids,
            lengths,
            response_mask: mask,
            finish_reasons: fields.finish_reasons,
            prompts: fields.prompts,
            responses: fields.responses,
            labels: fields.labels,
            policy_version: fields.policy_version,
            generation: fields.generation,
        })
    }
}

impl Message for ActorReport {
    const KIND: &'static str = "actor_report";
    fn to_body(&self) -> Body {
        Body::of(self.num_tokens)
            .with_numbers([
                self.policy_loss,
                self.kl_loss,
                self.entropy,
                self.clip_fraction,
                self.ppo_kl,
                self.approx_kl,
                self.ratio_max,
                self.grad_norm,
                self.lr,
                self.response_tokens,
            ])
            .with("ratios", &Tensor::from_slice(&self.ratios))
    }
    fn from_body(body: &mut Body) -> Result<ActorReport> {
        let [
            policy_loss,
            kl_loss,
            entropy,
            clip_fraction,
            ppo_kl,
            approx_kl,
            ratio_max,
            grad_norm,
            lr,
            response_tokens,
        ] = body.numbers()?;
        Ok(ActorReport {
            policy_loss,
            kl_loss,
            entropy,
            clip_fraction,
            ppo_kl,
            approx_kl,
            ratio_max,
            grad_norm,
            lr,
            ratios: Vec::try_from(body.tensor("ratios")?)?,
            num_tokens: body.fields()?,
            response_tokens,
        })
    }
}

impl Message for CriticReport {
    const KIND: &'static str = "critic_report";
    fn to_body(&self) -> Body {
        let CriticReport { critic_loss, clip_fraction, values_mean, grad_norm, lr, num_tokens, response_tokens } =
            *self;
        let numbers = [critic_loss, clip_fraction, values_mean, grad_norm, lr, response_tokens];
        Body::of(num_tokens).with_numbers(numbers)
    }
    fn from_body(body: &mut Body) -> Result<CriticReport> {
        let [critic_loss, clip_fraction, values_mean, grad_norm, lr, response_tokens] = body.numbers()?;
        let num_tokens = body.fields()?;
        Ok(CriticReport { critic_loss, clip_fraction, values_mean, grad_norm, lr, num_tokens, response_tokens })
    }
}

impl Message for LearnReport {
    const KIND: &'static str = "learn_report";
    fn to_body(&self) -> Body {
        let LearnReport { loss, accuracy, grad_norm, lr, num_tokens } = *self;
        Body::of(num_tokens).with_numbers([loss, accuracy, grad_norm, lr])
    }
    fn from_body(body: &mut Body) -> Result<LearnReport> {
        let [loss, accuracy, grad_norm, lr] = body.numbers()?;
        Ok(LearnReport { loss, accuracy, grad_norm, lr, num_tokens: body.fields()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn again<M: Message>(message: &M) -> M {
        decode(&encode(message)).unwrap()
    }

    fn some_tokens() -> Tokens {
        let row = |n: i64| ((0..n).map(|t| 10 * n + t).collect(), (0..n).map(|t| t > 1).collect());
        Tokens::from_rows(&[row(4), row(2), row(5)])
    }

    fn same_tokens(found: &Tokens, expected: &Tokens) {
        assert_eq!((&found.token_ids, &found.lengths), (&expected.token_ids, &expected.lengths));
        assert_eq!(found.mask, expected.mask);
        assert_eq!(found.mask.kind(), Kind::Bool);
    }

    #[test]
    fn tokens_and_tensors_come_back_the_same() {
        let found = again(&Logprobs { role: Role::Reference, tokens: some_tokens() });
        assert_eq!(found.role, Role::Reference);
        same_tokens(&found.tokens, &some_tokens());
        for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
            let tensor = Tensor::rand([3, 5], (Kind::Double, Device::Cpu)).to_kind(kind).narrow(1, 1, 3);
            let found = again(&tensor);
            assert_eq!((found.kind(), &found), (kind, &tensor));
        }
        let none = Tensor::zeros([0, 0], tch::kind::FLOAT_CPU);
        assert_eq!(again(&none).size(), [0, 0], "a rank without rows");
    }

    #[test]
    fn an_experience_comes_back_the_same() {
        let of = |seed: f64| Tensor::rand([3, 5], (Kind::Float, Device::Cpu)) + seed;
        for ref_logprobs in [None, Some(of(4.0))] {
            let experience = Experience {
                tokens: some_tokens(),
                old_logprobs: of(0.0),
                ref_logprobs,
                values: of(1.0),
                advantages: of(2.0),
                returns: of(3.0),
            };
            let request = UpdateActor { experience, num_tokens: 7.0, kl_coef: 0.1 };
            let found = again(&request);
            assert_eq!((found.num_tokens, found.kl_coef), (7.0, 0.1));
            same_tokens(&found.experience.tokens, &request.experience.tokens);
            assert_eq!(found.experience.old_logprobs, request.experience.old_logprobs);
            assert_eq!(found.experience.ref_logprobs, request.experience.ref_logprobs);
            assert_eq!(found.experience.returns, request.experience.returns);
        }
    }

    #[test]
    fn examples_come_back_the_same() {
        let request = Learn { rows: some_tokens(), rows_per_example: 3, num_learned: 7.0, lr: 0.1 + 0.2 };
        let found = again(&request);
        assert_eq!((found.rows_per_example, found.num_learned, found.lr), (3, 7.0, 0.1 + 0.2));
        same_tokens(&found.rows, &request.rows);
        same_tokens(&again(&Assess { rows: some_tokens() }).rows, &some_tokens());
        let report = LearnReport { loss: 0.1 + 0.2, accuracy: 0.5, grad_norm: f64::INFINITY, lr: 1e-5, num_tokens: 9 };
        assert_eq!(again(&report), report);
    }

    #[test]
    fn numbers_that_json_has_no_words_for_come_back() {
        let report = ActorReport {
            policy_loss: 0.1 + 0.2,
            ratio_max: f64::NEG_INFINITY,
            ratios: vec![1.5, 0.25],
            num_tokens: 3,
            response_tokens: 2.0,
            ..ActorReport::default()
        };
        assert_eq!(again(&report), report);
        let found = again(&CriticReport { values_mean: f64::NAN, ..CriticReport::default() });
        assert!(found.values_mean.is_nan());
    }

    #[test]
    fn other_and_damaged_bytes_are_refused() {
        let bytes = encode(&Publish { policy_version: 3 });
        assert_eq!(decode::<Publish>(&bytes).unwrap().policy_version, 3);
        let error = decode::<Generate>(&bytes).err().unwrap().to_string();
        assert!(error.contains("`generate`") && error.contains("`publish`"), "{error}");
        let whole = encode(&Values { tokens: some_tokens() });
        for end in 0..whole.len() {
            assert!(decode::<Values>(&whole[..end]).is_err(), "cut at {end}");
        }
        let long = Values { tokens: Tokens { lengths: vec![4, 9, 5], ..some_tokens() } };
        assert!(decode::<Values>(&encode(&long)).is_err(), "a row longer than its columns");
    }

    #[test]
    fn errors_keep_what_the_driver_acts_on() {
        let told = |error: &Error| error_from_text(&error_to_text(error));
        assert!(matches!(told(&Error::Interrupted), Error::Interrupted));
        assert!(matches!(told(&Error::WorkerGone("out".into())), Error::WorkerGone(cause) if cause == "out"));
        let error = Error::Refused("no room".into());
        assert_eq!(told(&error).to_string(), "no room");
        assert_eq!(error_from_text("stack overflow").to_string(), "stack overflow");
    }
}
