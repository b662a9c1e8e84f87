//! Rows of data: read, checked, mixed, shuffled.
//!
//! A row is a JSON object whatever the file's format. Each reader turns a row into its own type
//! ([`PromptRow`], [`TrainingExample`], [`Pair`]) and every failure names the file, the line, the key and the keys
//! the row does have. A [`Mix`] holds the rows of several weighted sources, and a [`RowStream`] draws from it
//! without end in an order fixed by the seed, from any [`StreamPosition`].

mod error;
mod file;
mod parquet_file;
mod prompt;
mod shuffle;
mod source;
mod stream;
mod training;
mod transcript;

pub use error::{DataError, Place};
pub use file::{Row, Visit, visit_rows};
pub use prompt::{Message, PromptKeys, PromptRow, PromptText};
pub use shuffle::{hold_out, permutation};
pub use source::{Dropped, FilterError, Judge, LoadReport, Loaded, Verdict, load_pairs, load_prompts, load_training};
pub use stream::{Draw, Mix, MixSource, PromptStream, RowId, RowStream, StreamPosition};
pub use training::{Pair, PairKeys, TrainingExample, TrainingKeys};
pub use transcript::parse_transcript;
