//! Functions that any node may run: found by name, arguments and value as bytes.
//!
//! All processes of a run are one build, so that a name means the same everywhere. A function is a plain `fn`: it has
//! no state that a second run could find changed (TK-8).

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use echelon_core::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A function from `A` to `R`, to be declared once as a constant.
pub struct Function<A, R> {
    pub(super) name: &'static str,
    run: fn(A) -> Result<R>,
    arguments: Format<A>,
    value: Format<R>,
}

/// How a type is written and read.
struct Format<T> {
    write: fn(&T) -> Result<Bytes, String>,
    read: fn(&Bytes) -> Result<T, String>,
}

impl<A, R> Clone for Function<A, R> {
    fn clone(&self) -> Function<A, R> {
        *self
    }
}

impl<A, R> Copy for Function<A, R> {}

impl<T> Clone for Format<T> {
    fn clone(&self) -> Format<T> {
        *self
    }
}

impl<T> Copy for Format<T> {}

impl<A: Serialize + DeserializeOwned, R: Serialize + DeserializeOwned> Function<A, R> {
    /// Arguments and value travel as JSON: numbers must be finite.
    pub const fn new(name: &'static str, run: fn(A) -> Result<R>) -> Function<A, R> {
        Function { name, run, arguments: json(), value: json() }
    }
}

impl Function<Bytes, Bytes> {
    /// Arguments and value travel as they are.
    pub const fn of_bytes(name: &'static str, run: fn(Bytes) -> Result<Bytes>) -> Function<Bytes, Bytes> {
        const PLAIN: Format<Bytes> = Format { write: |bytes| Ok(bytes.clone()), read: |bytes| Ok(bytes.clone()) };
        Function { name, run, arguments: PLAIN, value: PLAIN }
    }
}

const fn json<T: Serialize + DeserializeOwned>() -> Format<T> {
    Format {
        write: |value| serde_json::to_vec(value).map(Bytes::from).map_err(|error| error.to_string()),
        read: |bytes| serde_json::from_slice(bytes).map_err(|error| error.to_string()),
    }
}

impl<A, R> Function<A, R> {
    pub(super) fn write(&self, arguments: &A) -> Result<Bytes, String> {
        (self.arguments.write)(arguments)
    }

    pub(super) fn reader(&self) -> fn(&Bytes) -> Result<R, String> {
        self.value.read
    }
}

/// The functions that a process knows. All processes of a run register the same.
#[derive(Clone, Default)]
pub struct Functions(HashMap<&'static str, Arc<Runnable>>);

type Runnable = dyn Fn(&Bytes) -> Result<Bytes> + Send + Sync;

impl Functions {
    /// Adds a function.
    ///
    /// # Panics
    /// Another has its name.
    #[must_use]
    pub fn with<A: 'static, R: 'static>(mut self, function: &Function<A, R>) -> Functions {
        let Function { name, run, arguments, value } = *function;
        let problem = move |what: &str, cause: String| Error::Refused(format!("{what}: {cause}"));
        let runnable = move |bytes: &Bytes| {
            let arguments = (arguments.read)(bytes).map_err(|cause| problem("reading its arguments", cause))?;
            (value.write)(&run(arguments)?).map_err(|cause| problem("writing its value", cause))
        };
        let former = self.0.insert(name, Arc::new(runnable));
        assert!(former.is_none(), "two functions are called {name}");
        self
    }

    pub(super) fn find(&self, name: &str) -> Option<&Runnable> {
        self.0.get(name).map(Arc::as_ref)
    }

    /// Names, for messages.
    pub(super) fn names(&self) -> String {
        let mut names: Vec<_> = self.0.keys().copied().collect();
        names.sort_unstable();
        if names.is_empty() { "none".into() } else { names.join(", ") }
    }
}
