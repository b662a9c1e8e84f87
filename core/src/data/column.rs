//! Columns by name and type: `rows[ADVANTAGES]` is a tensor, and a name that nobody declared does not compile.

use std::marker::PhantomData;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::error::{Error, Result};

/// The name of a column, and what it holds for each row.
#[derive(Debug)]
pub struct Column<K> {
    pub name: &'static str,
    kind: PhantomData<fn() -> K>,
}

impl<K> Clone for Column<K> {
    fn clone(&self) -> Column<K> {
        *self
    }
}

impl<K> Copy for Column<K> {}

impl<K: ColumnKind> Column<K> {
    pub const fn new(name: &'static str) -> Column<K> {
        Column { name, kind: PhantomData }
    }
}

/// What a column can hold.
pub trait ColumnKind: sealed::Sealed {
    type Values;
    #[doc(hidden)]
    fn wrap(values: Self::Values) -> Values;
    #[doc(hidden)]
    fn of(values: &Values) -> Option<&Self::Values>;
}

mod sealed {
    pub trait Sealed {}
}

/// `[B, T]`, a number for every token.
#[derive(Debug)]
pub enum PerToken {}

/// `[B]`, a number for every row.
#[derive(Debug)]
pub enum PerRow {}

/// A text for every row.
#[derive(Debug)]
pub enum Text {}

/// A text for every row that has one.
#[derive(Debug)]
pub enum Label {}

/// As many numbers as a row has.
#[derive(Debug)]
pub enum Ragged {}

/// Values of rows of different lengths, end to end.
#[derive(Debug)]
pub struct RaggedValues {
    /// `[N, …]`.
    pub values: Tensor,
    /// `[B]`, together N.
    pub lengths: Vec<i64>,
}

/// A column's values, of any kind.
#[derive(Debug)]
#[doc(hidden)]
pub enum Values {
    PerToken(Tensor),
    PerRow(Tensor),
    Text(Vec<Arc<str>>),
    Label(Vec<Option<Arc<str>>>),
    Ragged(RaggedValues),
}

macro_rules! kinds {
    ($($kind:ident: $values:ty,)*) => {
        $(impl sealed::Sealed for $kind {}
        impl ColumnKind for $kind {
            type Values = $values;
            fn wrap(values: $values) -> Values {
                Values::$kind(values)
            }
            fn of(values: &Values) -> Option<&$values> {
                if let Values::$kind(values) = values { Some(values) } else { None }
            }
        })*
    };
}

kinds! {
    PerToken: Tensor,
    PerRow: Tensor,
    Text: Vec<Arc<str>>,
    Label: Vec<Option<Arc<str>>>,
    Ragged: RaggedValues,
}

impl RaggedValues {
    /// Of the rows at `indices`.
    fn select(&self, indices: &[i64]) -> RaggedValues {
        let starts: Vec<i64> =
            self.lengths.iter().scan(0, |end, length| Some(std::mem::replace(end, *end + length))).collect();
        let span = |&row: &i64| starts[row as usize]..starts[row as usize] + self.lengths[row as usize];
        let places: Vec<i64> = indices.iter().flat_map(span).collect();
        let lengths = indices.iter().map(|&row| self.lengths[row as usize]).collect();
        RaggedValues {
            values: self.values.index_select(0, &Tensor::from_slice(&places).to_device(self.values.device())),
            lengths,
        }
    }
}

/// What of a column is no tensor, on its way to another process.
#[derive(Serialize, Deserialize)]
pub(super) enum Texts {
    Text(Vec<String>),
    Label(Vec<Option<String>>),
}

impl Values {
    /// Refuses a column that does not fit `[B, T]` rows.
    pub(super) fn check(&self, name: &str, [rows, width]: [i64; 2]) -> Result<()> {
        let shape = |expected: Vec<i64>, tensor: &Tensor| match tensor.size() == expected {
            true => Ok(()),
            false => Err(Error::Shape { what: name.to_owned(), expected, found: tensor.size() }),
        };
        let count = |found: usize| match found as i64 == rows {
            true => Ok(()),
            false => Err(Error::Refused(format!("{rows} rows of tokens with {found} {name}"))),
        };
        match self {
            Values::PerToken(tensor) => shape(vec![rows, width], tensor),
            Values::PerRow(tensor) => shape(vec![rows], tensor),
            Values::Text(texts) => count(texts.len()),
            Values::Label(texts) => count(texts.len()),
            Values::Ragged(RaggedValues { values, lengths }) => {
                count(lengths.len())?;
                let mut expected = values.size();
                expected[0] = lengths.iter().sum();
                shape(expected, values)
            }
        }
    }

    /// Of the rows at `indices` (`rows` is the same as a tensor), cut to `width` tokens.
    pub(super) fn select(&self, indices: &[i64], rows: &Tensor, width: i64) -> Values {
        match self {
            Values::PerToken(tensor) => Values::PerToken(tensor.index_select(0, rows).narrow(1, 0, width)),
            Values::PerRow(tensor) => Values::PerRow(tensor.index_select(0, rows)),
            Values::Text(all) => Values::Text(indices.iter().map(|&row| all[row as usize].clone()).collect()),
            Values::Label(all) => Values::Label(indices.iter().map(|&row| all[row as usize].clone()).collect()),
            Values::Ragged(ragged) => Values::Ragged(ragged.select(indices)),
        }
    }

    /// The rows of `parts` end to end; per-token values are 0 beyond a part's own `width`.
    pub(super) fn concat(parts: Vec<&Values>, width: i64) -> Option<Values> {
        fn each<'a, T>(parts: &[&'a Values], of: impl Fn(&'a Values) -> Option<T>) -> Option<Vec<T>> {
            parts.iter().map(|part| of(part)).collect()
        }
        let wide = |tensor: &Tensor| tensor.constant_pad_nd([0, width - tensor.size()[1]]);
        Some(match parts.first()? {
            Values::PerToken(_) => {
                Values::PerToken(Tensor::cat(&each(&parts, |part| PerToken::of(part).map(wide))?, 0))
            }
            Values::PerRow(_) => Values::PerRow(Tensor::cat(&each(&parts, PerRow::of)?, 0)),
            Values::Text(_) => Values::Text(each(&parts, Text::of)?.into_iter().flatten().cloned().collect()),
            Values::Label(_) => Values::Label(each(&parts, Label::of)?.into_iter().flatten().cloned().collect()),
            Values::Ragged(_) => {
                let parts = each(&parts, Ragged::of)?;
                let values: Vec<&Tensor> = parts.iter().map(|part| &part.values).collect();
                let lengths = parts.iter().flat_map(|part| part.lengths.iter().copied()).collect();
                Values::Ragged(RaggedValues { values: Tensor::cat(&values, 0), lengths })
            }
        })
    }

    /// The same with other tensors.
    pub(super) fn map(&self, of: &impl Fn(&Tensor) -> Tensor) -> Values {
        match self {
            Values::PerToken(tensor) => Values::PerToken(of(tensor)),
            Values::PerRow(tensor) => Values::PerRow(of(tensor)),
            Values::Text(texts) => Values::Text(texts.clone()),
            Values::Label(texts) => Values::Label(texts.clone()),
            Values::Ragged(RaggedValues { values, lengths }) => {
                Values::Ragged(RaggedValues { values: of(values), lengths: lengths.clone() })
            }
        }
    }

    /// Its tensors as `(kind, tensor)`, or its texts.
    pub(super) fn parts(&self) -> (Vec<(&'static str, Tensor)>, Option<Texts>) {
        match self {
            Values::PerToken(tensor) => (vec![(PER_TOKEN, tensor.shallow_clone())], None),
            Values::PerRow(tensor) => (vec![(PER_ROW, tensor.shallow_clone())], None),
            Values::Text(texts) => (Vec::new(), Some(Texts::Text(texts.iter().map(|text| text.to_string()).collect()))),
            Values::Label(texts) => {
                let texts = texts.iter().map(|text| text.as_deref().map(str::to_owned));
                (Vec::new(), Some(Texts::Label(texts.collect())))
            }
            Values::Ragged(RaggedValues { values, lengths }) => {
                let lengths = Tensor::from_slice(lengths);
                (vec![(RAGGED, values.shallow_clone()), (RAGGED_LENGTHS, lengths)], None)
            }
        }
    }

    /// The column of a tensor of this kind; the second of a ragged column's two is found by `lengths`.
    pub(super) fn of_tensor(
        kind: &str,
        tensor: Tensor,
        lengths: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Option<Values>> {
        Ok(Some(match kind {
            PER_TOKEN => Values::PerToken(tensor),
            PER_ROW => Values::PerRow(tensor),
            RAGGED => {
                let lengths = Vec::<i64>::try_from(lengths()?.to_device(Device::Cpu))?;
                Values::Ragged(RaggedValues { values: tensor, lengths })
            }
            _ => return Ok(None),
        }))
    }
}

impl From<Texts> for Values {
    fn from(texts: Texts) -> Values {
        match texts {
            Texts::Text(texts) => Values::Text(texts.into_iter().map(Arc::from).collect()),
            Texts::Label(texts) => Values::Label(texts.into_iter().map(|text| text.map(Arc::from)).collect()),
        }
    }
}

/// Kinds of a column's tensors in a message's bytes.
const PER_TOKEN: &str = "token";
const PER_ROW: &str = "row";
const RAGGED: &str = "ragged";
pub(super) const RAGGED_LENGTHS: &str = "ragged_lengths";
