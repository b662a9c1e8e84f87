//! What can be asked of a role's ranks: a file for each verb, with its parameters, its reply, and how its rows go over the
//! ranks. A worker finds it by the list below.

mod export;
mod generate;
mod group;
mod learn;
mod logprobs;
mod matmul_rate;
mod memory;
mod publish;
mod restore;
mod save;
mod scores;
mod values;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tch::Tensor;

use crate::data::{Report, Rows, Shares, deal};
use crate::error::Result;
use crate::message::{Body, Message};
use crate::role::Role;

pub use generate::Generated;
pub use group::{Answer, Calls, Endpoint, Reward, Roles, Scored, Span, WorkerGroup};

/// Declares every verb: its type, what a rank of any role answers, and the list that `for_each_verb!` hands to a macro.
macro_rules! verbs {
    ($d:tt $($module:ident::$verb:ident,)*) => {
        $(pub use $module::$verb;)*

        /// One rank, whatever its role.
        pub trait Rank: $(Endpoint<$verb> +)* {}
        impl<T: $(Endpoint<$verb> +)*> Rank for T {}

        /// What holds the roles of one device and answers every verb.
        pub trait ServeAll: $(Serve<$verb> +)* {}
        impl<T: $(Serve<$verb> +)*> ServeAll for T {}

        /// Calls `callback!` with the names of all verbs.
        #[macro_export]
        macro_rules! for_each_verb {
            ($d callback:ident) => { $d callback!($($verb),*) };
        }
    };
}

verbs! { $
    generate::Generate,
    logprobs::Logprobs,
    values::Values,
    scores::Scores,
    learn::Learn,
    publish::Publish,
    save::Save,
    restore::Restore,
    export::Export,
    memory::Memory,
    matmul_rate::MatmulRate,
}

/// What is asked, with its parameters; the rows that it works on go beside it.
pub trait Verb: Clone + Send + Serialize + DeserializeOwned + 'static {
    /// As it stands in errors, traces and on the wire.
    const NAME: &'static str;
    type Reply: Reply;

    /// Neighbouring rows that stay together on a rank.
    fn unit(&self) -> usize {
        1
    }

    /// One request per data-parallel rank, and which rows of the reply come from which. A rank may get no row.
    fn divide(request: Request<Self>, ranks: usize) -> (Vec<Request<Self>>, Shares) {
        let shares = deal(&request.rows.lengths, request.verb.unit(), ranks);
        (shares.iter().map(|share| request.with(request.rows.select(share))).collect(), shares)
    }
}

/// A verb, whom it is asked of, and the rows that it works on (none for most verbs without rows).
#[derive(Debug)]
pub struct Request<V> {
    /// None where the whole worker is meant.
    pub role: Option<Role>,
    pub verb: V,
    pub rows: Rows,
}

impl<V: Verb> Request<V> {
    /// Of a worker as a whole.
    pub fn of_worker(verb: V) -> Request<V> {
        Request { role: None, verb, rows: Rows::default() }
    }

    /// The same about other rows.
    pub fn with(&self, rows: Rows) -> Request<V> {
        Request { role: self.role, verb: self.verb.clone(), rows }
    }
}

impl<V: Verb> Message for Request<V> {
    const KIND: &'static str = V::NAME;
    fn to_body(&self) -> Body {
        self.rows.add_to(Body::default().with_field("verb", (self.role, &self.verb)))
    }
    fn from_body(body: &mut Body) -> Result<Request<V>> {
        let (role, verb) = body.field("verb")?;
        Ok(Request { role, verb, rows: Rows::take_from(body)? })
    }
}

/// An answer, and how those of several ranks become one.
pub trait Reply: Message + Send + 'static {
    /// # Errors
    /// Answers that contradict each other.
    fn unite(replies: Vec<Self>, shares: &Shares) -> Result<Self>;
}

/// What holds the roles of one device; runs on that device's thread, one request at a time.
pub trait Serve<V: Verb> {
    fn serve(&mut self, request: Request<V>) -> Result<V::Reply>;
}

impl Reply for Rows {
    fn unite(replies: Vec<Rows>, shares: &Shares) -> Result<Rows> {
        Rows::unite(&replies, shares)
    }
}

/// `[b, t]` or `[b]` answers as `[B, T]` or `[B]`, in the order of the request's rows, 0 beyond a rank's columns.
impl Reply for Tensor {
    fn unite(replies: Vec<Tensor>, shares: &Shares) -> Result<Tensor> {
        let width = |reply: &Tensor| reply.size().get(1).copied();
        let wide = match replies.iter().filter_map(width).max() {
            Some(widest) => replies
                .iter()
                .map(|reply| {
                    width(reply).map_or_else(|| reply.shallow_clone(), |own| reply.constant_pad_nd([0, widest - own]))
                })
                .collect(),
            None => replies,
        };
        Ok(Tensor::cat(&wide, 0).index_select(0, &Tensor::from_slice(&crate::data::places(shares))))
    }
}

impl Reply for Report {
    fn unite(replies: Vec<Report>, shares: &Shares) -> Result<Report> {
        Ok(Report::unite(replies, shares))
    }
}

impl Reply for () {
    fn unite(_replies: Vec<()>, _shares: &Shares) -> Result<()> {
        Ok(())
    }
}
