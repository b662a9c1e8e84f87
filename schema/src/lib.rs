//! What recipes are made of, below every package that declares keys: [`table!`] and [`choice!`] declare them, a tree of
//! [`Node`]s that know their places is read into them by a [`Reader`], [`Rules`] hold between them, and every
//! [`Problem`] is printed with its line and a caret. How a recipe's text becomes nodes is the program's.
//!
//! serde is absent on purpose: its errors stop at the first, and know no key of another table to suggest.

mod choice;
mod error;
mod names;
mod node;
mod range;
mod reader;
mod reference;
mod rules;
mod table;
mod value;
mod writer;

pub use choice::Choice;
pub use error::{Diagnostic, Problem, RecipeError};
pub use names::{Foreign, nearest};
pub use node::{Document, Documents, Entry, Item, Node, Origin};
pub use range::{MOST, Range, above, above_to, at_least, between, from_below};
pub use reader::{Reader, collect_names};
pub use reference::program;
pub use rules::{Origins, Rules};
pub use table::{Field, Key, Table, Value};
#[doc(hidden)]
pub use value::describe_scalar;
pub use value::{Auto, ModelSource, NewPath, Scalar};
pub use writer::{Writer, to_toml};
