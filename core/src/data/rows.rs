//! Rows of tokens: what a model reads, which tokens are the policy's own, and what is known of them, by name.

use std::collections::BTreeMap;
use std::ops::Index;

use tch::{Device, Kind, Tensor};

use super::column::{Column, ColumnKind, PerToken, RAGGED_LENGTHS, Texts, Values};
use super::divide::{Shares, places};
use crate::error::{Error, Result};
use crate::message::{Body, Message};

/// B rows, T columns of tokens; column `t` of what is known per token belongs to token `t` (AR-7). Rollouts, experience, examples
/// and pairs are rows that have other columns.
#[derive(Debug)]
pub struct Rows {
    /// `[B, T]` int64; padding is 0 and never read.
    pub token_ids: Tensor,
    /// `[B]` tokens of each row; the rest is padding.
    pub lengths: Vec<i64>,
    /// `[B, T]` bool: the tokens that the policy sampled, or those that are to be learned; any number of spans. Log-probs and
    /// values are made of these.
    pub own: Tensor,
    columns: BTreeMap<String, Values>,
}

impl Rows {
    /// Rows without columns.
    ///
    /// # Errors
    /// [`Error::Shape`] when the three do not fit each other, a row that is longer than its columns.
    pub fn new(token_ids: Tensor, lengths: Vec<i64>, own: Tensor) -> Result<Rows> {
        let (rows, width) = (lengths.len() as i64, token_ids.size().get(1).copied().unwrap_or(0));
        for (what, tensor) in [("token_ids", &token_ids), ("own", &own)] {
            if tensor.size() != [rows, width] {
                return Err(Error::Shape { what: what.into(), expected: vec![rows, width], found: tensor.size() });
            }
        }
        match lengths.iter().find(|&&length| !(0..=width).contains(&length)) {
            Some(length) => Err(Error::Refused(format!("a row of {length} tokens in {width} columns"))),
            None => Ok(Rows { token_ids, lengths, own, columns: BTreeMap::new() }),
        }
    }

    /// Lays out rows of token ids; `own[i][t]` belongs to token `t`.
    pub fn of_tokens(rows: &[(Vec<i64>, Vec<bool>)]) -> Rows {
        let width = rows.iter().map(|(ids, _)| ids.len()).max().unwrap_or(0);
        let mut token_ids = vec![0i64; rows.len() * width];
        let mut own = vec![false; rows.len() * width];
        for (row, (ids, wanted)) in rows.iter().enumerate() {
            token_ids[row * width..row * width + ids.len()].copy_from_slice(ids);
            own[row * width..row * width + ids.len()].copy_from_slice(wanted);
        }
        let size = [rows.len() as i64, width as i64];
        Rows {
            token_ids: Tensor::from_slice(&token_ids).view(size),
            lengths: rows.iter().map(|(ids, _)| ids.len() as i64).collect(),
            own: Tensor::from_slice(&own).view(size),
            columns: BTreeMap::new(),
        }
    }

    pub fn num_rows(&self) -> usize {
        self.lengths.len()
    }

    /// `[B, T]`.
    pub fn size(&self) -> [i64; 2] {
        [self.num_rows() as i64, self.token_ids.size()[1]]
    }

    pub fn num_tokens(&self) -> i64 {
        self.lengths.iter().sum()
    }

    /// Own tokens of all rows.
    pub fn num_own_tokens(&self) -> f64 {
        self.own.sum(Kind::Double).double_value(&[])
    }

    /// `[B]` f64: own tokens of each row.
    pub fn own_lengths(&self) -> Tensor {
        self.own.to_kind(Kind::Double).sum_dim_intlist(1, false, Kind::Double)
    }

    /// The same rows with one column more, or with another in its place.
    ///
    /// # Errors
    /// It does not fit the rows.
    pub fn with<K: ColumnKind>(mut self, column: Column<K>, values: K::Values) -> Result<Rows> {
        let values = K::wrap(values);
        values.check(column.name, self.size())?;
        self.columns.insert(column.name.into(), values);
        Ok(self)
    }

    /// [`Rows::with`], where there are values.
    ///
    /// # Errors
    /// As there.
    pub fn with_some<K: ColumnKind>(self, column: Column<K>, values: Option<K::Values>) -> Result<Rows> {
        match values {
            Some(values) => self.with(column, values),
            None => Ok(self),
        }
    }

    /// The same with these columns' numbers per token in the dtype of the passes that read them.
    pub fn per_token_in(mut self, kind: Kind, columns: &[Column<PerToken>]) -> Rows {
        for column in columns {
            if let Some(Values::PerToken(tensor)) = self.columns.get_mut(column.name) {
                *tensor = tensor.to_kind(kind);
            }
        }
        self
    }

    pub fn get<K: ColumnKind>(&self, column: Column<K>) -> Option<&K::Values> {
        K::of(self.columns.get(column.name)?)
    }

    pub fn has(&self, name: &str) -> bool {
        self.columns.contains_key(name)
    }

    /// The rows with these of their columns alone.
    pub fn only(&self, names: &[&str]) -> Rows {
        let wanted = self.columns.iter().filter(|(name, _)| names.contains(&name.as_str()));
        self.map(&Tensor::shallow_clone, wanted)
    }

    /// The tokens, without a column.
    pub fn tokens(&self) -> Rows {
        self.only(&[])
    }

    /// Another handle of the same rows.
    pub fn shallow_clone(&self) -> Rows {
        self.map(&Tensor::shallow_clone, &self.columns)
    }

    pub fn to_device(&self, device: Device) -> Rows {
        self.map(&|tensor| tensor.to_device(device), &self.columns)
    }

    fn map<'a>(
        &'a self,
        of: &impl Fn(&Tensor) -> Tensor,
        columns: impl IntoIterator<Item = (&'a String, &'a Values)>,
    ) -> Rows {
        Rows {
            token_ids: of(&self.token_ids),
            lengths: self.lengths.clone(),
            own: of(&self.own),
            columns: columns.into_iter().map(|(name, values)| (name.clone(), values.map(of))).collect(),
        }
    }

    /// The rows at `indices`, cut to the longest of them.
    pub fn select(&self, indices: &[i64]) -> Rows {
        let lengths: Vec<i64> = indices.iter().map(|&row| self.lengths[row as usize]).collect();
        let width = lengths.iter().copied().max().unwrap_or(0);
        let rows = Tensor::from_slice(indices).to_device(self.token_ids.device());
        let pick = |tensor: &Tensor| tensor.index_select(0, &rows).narrow(1, 0, width);
        let columns = self.columns.iter().map(|(name, values)| (name.clone(), values.select(indices, &rows, width)));
        Rows { token_ids: pick(&self.token_ids), own: pick(&self.own), columns: columns.collect(), lengths }
    }

    /// The ranks' rows as one, in the order of the request: `shares` says whose are whose.
    ///
    /// # Errors
    /// Parts with different columns.
    pub fn unite(parts: &[Rows], shares: &Shares) -> Result<Rows> {
        let width = parts.iter().map(|part| part.size()[1]).max().unwrap_or(0);
        let wide = |of: fn(&Rows) -> &Tensor| {
            let parts = parts.iter().map(|part| of(part).constant_pad_nd([0, width - part.size()[1]]));
            Tensor::cat(&parts.collect::<Vec<_>>(), 0)
        };
        let mut columns = BTreeMap::new();
        // A rank without rows may know of no column.
        let filled: Vec<&Rows> = parts.iter().filter(|part| part.num_rows() > 0).collect();
        for name in filled.iter().flat_map(|part| part.columns.keys()) {
            let of_each: Option<Vec<&Values>> = filled.iter().map(|part| part.columns.get(name)).collect();
            let united = of_each.and_then(|parts| Values::concat(parts, width));
            let differ = || Error::Refused(format!("some ranks' rows have a column `{name}`, others have not"));
            columns.insert(name.clone(), united.ok_or_else(differ)?);
        }
        let lengths = parts.iter().flat_map(|part| part.lengths.iter().copied()).collect();
        let own = wide(|rows| &rows.own).to_kind(Kind::Bool);
        let end_to_end = Rows { token_ids: wide(|rows| &rows.token_ids), lengths, own, columns };
        Ok(end_to_end.select(&places(shares)))
    }

    /// Its tensors by plain names, for a file that a person reads.
    pub fn named_tensors(&self) -> Vec<(String, Tensor)> {
        let own = [
            ("token_ids".to_owned(), self.token_ids.shallow_clone()),
            ("lengths".into(), Tensor::from_slice(&self.lengths)),
            ("response_mask".into(), self.own.shallow_clone()),
        ];
        let columns = self.columns.iter();
        let first = columns.filter_map(|(name, values)| Some((name.clone(), values.parts().0.into_iter().next()?.1)));
        own.into_iter().chain(first).collect()
    }

    /// Adds the rows to a message.
    pub(crate) fn add_to(&self, mut body: Body) -> Body {
        let mut texts = BTreeMap::new();
        for (name, values) in &self.columns {
            let (tensors, text) = values.parts();
            body = tensors.iter().fold(body, |body, (kind, tensor)| body.with(&format!("{kind}/{name}"), tensor));
            texts.extend(text.map(|text| (name, text)));
        }
        body.with("token_ids", &self.token_ids)
            .with("lengths", &Tensor::from_slice(&self.lengths))
            .with("own", &self.own)
            .with_field("texts", texts)
    }

    /// The rows in a message.
    pub(crate) fn take_from(body: &mut Body) -> Result<Rows> {
        let lengths = Vec::<i64>::try_from(body.tensor("lengths")?)?;
        let mut rows = Rows::new(body.tensor("token_ids")?, lengths, body.tensor("own")?)?;
        for (name, texts) in body.field::<BTreeMap<String, Texts>>("texts")? {
            rows.columns.insert(name, texts.into());
        }
        for full in body.tensor_names() {
            let Some((kind, name)) = full.split_once('/').filter(|(kind, _)| *kind != RAGGED_LENGTHS) else { continue };
            let tensor = body.tensor(&full)?;
            let lengths = || body.tensor(&format!("{RAGGED_LENGTHS}/{name}"));
            if let Some(values) = Values::of_tensor(kind, tensor, lengths)? {
                rows.columns.insert(name.to_owned(), values);
            }
        }
        let size = rows.size();
        rows.columns.iter().try_for_each(|(name, values)| values.check(name, size))?;
        Ok(rows)
    }
}

/// # Panics
/// The rows have no such column: whoever made them left it out. [`Rows::get`] asks.
impl<K: ColumnKind> Index<Column<K>> for Rows {
    type Output = K::Values;

    fn index(&self, column: Column<K>) -> &K::Values {
        self.get(column).unwrap_or_else(|| panic!("rows without a column `{}`", column.name))
    }
}

impl Default for Rows {
    /// No row.
    fn default() -> Rows {
        Rows::of_tokens(&[])
    }
}

impl Message for Rows {
    const KIND: &'static str = "rows";
    fn to_body(&self) -> Body {
        self.add_to(Body::default())
    }
    fn from_body(body: &mut Body) -> Result<Rows> {
        Rows::take_from(body)
    }
}

#[cfg(test)]
mod tests {
    use super::super::column::RaggedValues;
    use super::super::divide::deal;
    use super::super::{Label, PerRow, Ragged, Text};
    use super::*;
    use crate::message::{decode, encode};

    const NUMBERS: Column<PerToken> = Column::new("numbers");
    const SCORES: Column<PerRow> = Column::new("scores");
    const WORDS: Column<Text> = Column::new("words");
    const MARKS: Column<Label> = Column::new("marks");
    const PIXELS: Column<Ragged> = Column::new("pixels");

    /// Rows whose columns say which row they are of.
    fn rows() -> Rows {
        let lengths = [4i64, 1, 3, 2, 6];
        let row = |n: i64| ((0..n).map(|t| 10 * n + t).collect(), (0..n).map(|t| t > 0).collect());
        let rows = Rows::of_tokens(&lengths.map(row));
        let numbers = rows.token_ids.to_kind(Kind::Double) / 2.0;
        let pixels: Vec<f64> = lengths.iter().flat_map(|&n| vec![n as f64; n as usize % 3]).collect();
        let pixels = RaggedValues { values: Tensor::from_slice(&pixels), lengths: lengths.map(|n| n % 3).to_vec() };
        let marks = lengths.map(|n| (n > 2).then(|| n.to_string().into()));
        rows.with(NUMBERS, numbers)
            .and_then(|rows| rows.with(SCORES, Tensor::from_slice(&lengths.map(|n| n as f64))))
            .and_then(|rows| rows.with(WORDS, lengths.map(|n| format!("row of {n}").into()).to_vec()))
            .and_then(|rows| rows.with(MARKS, marks.to_vec()))
            .and_then(|rows| rows.with(PIXELS, pixels))
            .unwrap()
    }

    fn same(found: &Rows, expected: &Rows) {
        assert_eq!(
            (&found.token_ids, &found.lengths, &found.own),
            (&expected.token_ids, &expected.lengths, &expected.own)
        );
        assert_eq!((&found[NUMBERS], &found[SCORES]), (&expected[NUMBERS], &expected[SCORES]));
        assert_eq!((&found[WORDS], &found[MARKS]), (&expected[WORDS], &expected[MARKS]));
        assert_eq!(found[PIXELS].values, expected[PIXELS].values);
        assert_eq!(found[PIXELS].lengths, expected[PIXELS].lengths);
        assert_eq!((found.own.kind(), found[SCORES].kind()), (Kind::Bool, Kind::Double));
    }

    #[test]
    fn what_is_divided_and_united_comes_back_in_its_order() {
        let rows = rows();
        for ranks in 1..7 {
            let shares = deal(&rows.lengths, 1, ranks);
            let parts: Vec<Rows> = shares.iter().map(|share| rows.select(share)).collect();
            same(&Rows::unite(&parts, &shares).unwrap(), &rows);
        }
        let some = rows.select(&[3, 1]);
        assert_eq!((some.size(), &some[WORDS]), ([2, 2], &vec!["row of 2".into(), "row of 1".into()]));
        assert_eq!(Vec::<f64>::try_from(&some[PIXELS].values).unwrap(), [2.0, 2.0, 1.0]);
    }

    #[test]
    fn rows_come_back_the_same_from_their_bytes() {
        let rows = rows();
        same(&decode(&encode(&rows)).unwrap(), &rows);
        let none = decode::<Rows>(&encode(&rows.select(&[]))).unwrap();
        assert_eq!((none.size(), none.num_own_tokens()), ([0, 0], 0.0));
        let bytes = encode(&rows);
        for end in 0..bytes.len() {
            assert!(decode::<Rows>(&bytes[..end]).is_err(), "cut at {end}");
        }
        let long = Rows { lengths: vec![4, 9, 3, 2, 6], ..rows.tokens() };
        assert!(decode::<Rows>(&encode(&long)).is_err(), "a row longer than its columns");
    }

    #[test]
    fn a_column_that_does_not_fit_is_refused_with_its_name() {
        let refused = |rows: Result<Rows>| rows.err().unwrap().to_string();
        let narrow = Tensor::zeros([5, 5], tch::kind::FLOAT_CPU);
        assert_eq!(refused(rows().with(NUMBERS, narrow)), "numbers: expected shape [5, 6], found [5, 5]");
        assert_eq!(refused(rows().with(WORDS, vec!["".into()])), "5 rows of tokens with 1 words");
        let shares = vec![vec![0], vec![1]];
        let parts = [rows().select(&[0]), rows().select(&[1]).only(&["numbers"])];
        assert_eq!(refused(Rows::unite(&parts, &shares)), "some ranks' rows have a column `marks`, others have not");
    }

    #[test]
    fn only_what_is_asked_for_goes_on() {
        let rows = rows().only(&["scores"]);
        assert!(rows.has("scores") && !rows.has("numbers") && rows.get(WORDS).is_none());
        assert!(!rows.tokens().has("scores"));
    }
}
