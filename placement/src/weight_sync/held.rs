//! Which version of the weights a generator holds, and whether all of it.

use echelon_core::{Error, Result};

/// What a generator may say of its weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Held {
    Nothing,
    Whole(u64),
    /// Parts of a version, and why no more.
    Part(u64, String),
}

impl Held {
    /// Begins to take up a version: until it has ended well, there is nothing to sample with.
    pub fn begin(&mut self, version: u64) {
        *self = Held::Part(version, "they are still arriving".into());
    }

    /// Notes how taking up a version ended.
    pub fn end<T>(&mut self, version: u64, outcome: &Result<T>) {
        *self = match outcome {
            Ok(_) => Held::Whole(version),
            Err(error) => Held::Part(version, error.to_string()),
        };
    }

    /// # Errors
    /// `version` is not what is held, or not all of it.
    pub fn check(&self, version: u64) -> Result<()> {
        match self {
            Held::Whole(held) if *held == version => Ok(()),
            Held::Whole(held) => Err(Error::Refused(format!(
                "weights of version {version} are asked for, and this generator holds version {held}: publish version \
                 {version} to it first"
            ))),
            Held::Part(held, why) => Err(Error::Refused(format!(
                "weights of version {held} arrived only in part ({why}): publish them again before sampling"
            ))),
            Held::Nothing => Err(Error::Refused(format!(
                "weights of version {version} are asked for, and this generator has got none yet: publish them first"
            ))),
        }
    }
}
