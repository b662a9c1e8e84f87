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
}

impl<A, R> Function<A, R> {
    /// Arguments and value travel as JSON: numbers must be finite.
    pub const fn new(name: &'static str, run: fn(A) -> Result<R>) -> Function<A, R> {
        Function { name, run }
    }
}

pub(super) fn write(value: &impl Serialize) -> Result<Bytes, String> {
    serde_json::to_vec(value).map(Bytes::from).map_err(|error| error.to_string())
}

pub(super) fn read<T: DeserializeOwned>(bytes: &Bytes) -> Result<T, String> {
    serde_json::from_slice(bytes).map_err(|error| error.to_string())
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
    pub fn with<A: DeserializeOwned + 'static, R: Serialize + 'static>(
        mut self,
        function: &Function<A, R>,
    ) -> Functions {
        let Function { name, run } = *function;
        let problem = |what: &str, cause: String| Error::Refused(format!("{what}: {cause}"));
        let runnable = move |bytes: &Bytes| {
            let arguments = read(bytes).map_err(|cause| problem("reading its arguments", cause))?;
            write(&run(arguments)?).map_err(|cause| problem("writing its value", cause))
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
