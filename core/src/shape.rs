//! What a model looks like from outside: its layer units and their parameters, and what each rank holds of them under
//! tensor parallelism. Planner, sharding, checkpoints and weight sync work from this and need no architecture.

use serde::{Deserialize, Serialize};

/// The axis along which tensor parallelism splits a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TensorParallelAxis {
    /// Rows (output features, vocabulary): column-parallel linears, embeddings and heads.
    Rows,
    /// Rows by key-value heads: where there are fewer heads than ranks, several ranks hold the same one.
    KeyValueRows,
    /// Columns (input features): row-parallel linears.
    Columns,
    /// Every rank holds it whole (norms, score heads).
    Replicated,
}

/// One parameter, by its Hugging Face name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParamShape {
    pub name: String,
    pub shape: Vec<i64>,
    pub axis: TensorParallelAxis,
    /// Whether training moves it; not written where it does, as everywhere before parameters could be frozen.
    #[serde(default = "trained", skip_serializing_if = "Clone::clone")]
    pub trainable: bool,
}

fn trained() -> bool {
    true
}

impl ParamShape {
    pub fn numel(&self) -> i64 {
        self.shape.iter().product()
    }
}

/// What ZeRO gathers and releases at once; it may hold trained and frozen parameters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitShape {
    pub name: String,
    pub params: Vec<ParamShape>,
}

impl UnitShape {
    pub fn numel(&self) -> i64 {
        self.params.iter().map(ParamShape::numel).sum()
    }

    /// The unit's trained parameters, and its frozen ones.
    pub fn split(&self) -> [UnitShape; 2] {
        let part = |trainable: bool, name: String| {
            let params = self.params.iter().filter(|param| param.trainable == trainable).cloned().collect();
            UnitShape { name, params }
        };
        [part(true, self.name.clone()), part(false, format!("{}, frozen", self.name))]
    }
}

/// A model's sizes. Units are in the order of a forward pass: embedding, layers, final norm and head
/// (with tied embeddings the head's matrix is in the embedding's unit).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelShape {
    pub units: Vec<UnitShape>,
    pub hidden_size: i64,
    pub num_layers: usize,
    pub num_heads: i64,
    pub num_kv_heads: i64,
    pub head_dim: i64,
    pub intermediate_size: i64,
    pub vocab_size: i64,
}

impl ModelShape {
    /// The units that the final norm and the head read: a head without a matrix of its own reads the embedding's.
    pub fn head_units(&self) -> Vec<usize> {
        let last = self.units.len() - 1;
        let own_head = self.units[last].params.iter().any(|param| param.shape.len() > 1);
        if own_head { vec![last] } else { vec![0, last] }
    }

    /// The same model in regions instead of units: each unit's trained parameters, then its frozen ones, where it has such.
    /// A model of which all is trained has its units as regions.
    pub fn by_region(&self) -> ModelShape {
        let regions = self.units.iter().flat_map(UnitShape::split).filter(|region| !region.params.is_empty());
        ModelShape { units: regions.collect(), ..self.clone() }
    }

    /// Parameters of the whole model.
    pub fn num_params(&self) -> i64 {
        self.units.iter().map(UnitShape::numel).sum()
    }

    /// Whether `size` ranks can share the model: heads and gated width are divided evenly, key-value heads are divided
    /// evenly or each is held by equally many ranks, and every rank has a part of the vocabulary (the last may have less).
    pub fn splits_into(&self, size: usize) -> bool {
        let size = size as i64;
        size > 0
            && self.num_heads % size == 0
            && self.intermediate_size % size == 0
            && (self.num_kv_heads % size == 0 || size % self.num_kv_heads == 0)
            && (size - 1) * part_length(self.vocab_size, size) < self.vocab_size
    }

    /// What a rank holds of `param`, a parameter of this model.
    ///
    /// # Panics
    /// The model does not split into so many parts ([`ModelShape::splits_into`]).
    pub fn slice(&self, param: &ParamShape, part: TensorParallelPart) -> ParamSlice {
        let TensorParallelPart { rank, size } = part;
        assert!(rank < size && self.splits_into(size), "part {rank} of {size} of a model that splits so");
        let (rank, size) = (rank as i64, size as i64);
        let dim = usize::from(param.axis == TensorParallelAxis::Columns);
        let whole = param.shape[dim];
        let (start, length) = match param.axis {
            TensorParallelAxis::Replicated => (0, whole),
            TensorParallelAxis::KeyValueRows if self.num_kv_heads < size => {
                let head = whole / self.num_kv_heads;
                (rank / (size / self.num_kv_heads) * head, head)
            }
            _ => part_of(whole, rank, size),
        };
        ParamSlice { dim, start, length }
    }

    /// The model as one rank holds it: the same units and parameters, in the sizes of the rank's slices.
    ///
    /// # Errors
    /// The model does not split into so many parts.
    pub fn sliced(&self, part: TensorParallelPart) -> Result<ModelShape, SplitError> {
        if !self.splits_into(part.size) {
            return Err(SplitError::new(self, part.size));
        }
        let mut sliced = self.clone();
        for (unit, whole) in sliced.units.iter_mut().zip(&self.units) {
            for (param, whole) in unit.params.iter_mut().zip(&whole.params) {
                let slice = self.slice(whole, part);
                param.shape[slice.dim] = slice.length;
            }
        }
        let size = part.size as i64;
        sliced.num_heads /= size;
        sliced.num_kv_heads = (sliced.num_kv_heads / size).max(1);
        sliced.intermediate_size /= size;
        sliced.vocab_size = self.vocabulary(part).1;
        Ok(sliced)
    }

    /// Start and length of a rank's part of the vocabulary.
    pub fn vocabulary(&self, part: TensorParallelPart) -> (i64, i64) {
        part_of(self.vocab_size, part.rank as i64, part.size as i64)
    }
}

/// One of the ranks that share a model by tensor parallelism.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TensorParallelPart {
    pub rank: usize,
    pub size: usize,
}

impl TensorParallelPart {
    /// One rank that holds everything.
    pub const WHOLE: TensorParallelPart = TensorParallelPart { rank: 0, size: 1 };
}

/// What a rank holds of a parameter: `length` from `start` along dimension `dim`, and all of the other dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParamSlice {
    pub dim: usize,
    pub start: i64,
    pub length: i64,
}

/// A model that so many ranks cannot share.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{size} ranks cannot share {num_heads} heads, {num_kv_heads} key-value heads, a gated width of {intermediate_size} and \
     a vocabulary of {vocab_size}: tensor parallelism over {sizes} ranks can (it divides heads and gated width evenly, and \
     divides or repeats key-value heads)"
)]
pub struct SplitError {
    pub size: usize,
    pub num_heads: i64,
    pub num_kv_heads: i64,
    pub intermediate_size: i64,
    pub vocab_size: i64,
    /// The sizes that work, in words.
    pub sizes: String,
}

impl SplitError {
    fn new(shape: &ModelShape, size: usize) -> SplitError {
        let fitting: Vec<String> = (1..=shape.num_heads as usize)
            .filter(|&size| shape.splits_into(size))
            .map(|size| size.to_string())
            .collect();
        let sizes = match fitting.split_last() {
            Some((last, others)) if !others.is_empty() => format!("{} or {last}", others.join(", ")),
            _ => fitting.concat(),
        };
        SplitError {
            size,
            num_heads: shape.num_heads,
            num_kv_heads: shape.num_kv_heads,
            intermediate_size: shape.intermediate_size,
            vocab_size: shape.vocab_size,
            sizes,
        }
    }
}

/// Start and length of the part of `rank`: equal parts, the last of them cut where `whole` ends.
fn part_of(whole: i64, rank: i64, size: i64) -> (i64, i64) {
    let length = part_length(whole, size);
    let start = (rank * length).min(whole);
    (start, length.min(whole - start))
}

/// Length of every part but the last.
fn part_length(whole: i64, size: i64) -> i64 {
    (whole + size - 1) / size
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(num_heads: i64, num_kv_heads: i64, intermediate_size: i64, vocab_size: i64) -> ModelShape {
        use TensorParallelAxis::{Columns, KeyValueRows, Replicated, Rows};
        let (hidden_size, head_dim) = (10, 4);
        let (q, kv) = (num_heads * head_dim, num_kv_heads * head_dim);
        let params = [
            ("embedding", vec![vocab_size, hidden_size], Rows),
            ("norm", vec![hidden_size], Replicated),
            ("q", vec![q, hidden_size], Rows),
            ("k", vec![kv, hidden_size], KeyValueRows),
            ("k bias", vec![kv], KeyValueRows),
            ("o", vec![hidden_size, q], Columns),
            ("up", vec![intermediate_size, hidden_size], Rows),
        ];
        let param =
            |(name, shape, axis): (&str, Vec<i64>, _)| ParamShape { name: name.into(), shape, axis, trainable: true };
        ModelShape {
            units: vec![UnitShape { name: "all".into(), params: params.into_iter().map(param).collect() }],
            hidden_size,
            num_layers: 1,
            num_heads,
            num_kv_heads,
            head_dim,
            intermediate_size,
            vocab_size,
        }
    }

    /// How often each index along the split dimension is held by a rank.
    fn times_held(model: &ModelShape, param: &ParamShape, size: usize) -> Vec<usize> {
        let slices = (0..size).map(|rank| model.slice(param, TensorParallelPart { rank, size }));
        let slices: Vec<ParamSlice> = slices.collect();
        let held = |at: i64| slices.iter().filter(|s| (s.start..s.start + s.length).contains(&at)).count();
        (0..param.shape[slices[0].dim]).map(held).collect()
    }

    #[test]
    fn slices_tile_every_parameter() {
        for (model, sizes) in [(model(8, 2, 24, 37), vec![1, 2, 4, 8]), (model(6, 6, 12, 17), vec![1, 2, 3, 6])] {
            for size in sizes {
                for param in &model.units[0].params {
                    let times = match param.axis {
                        TensorParallelAxis::Replicated => size,
                        TensorParallelAxis::KeyValueRows => (size / model.num_kv_heads as usize).max(1),
                        _ => 1,
                    };
                    let held = times_held(&model, param, size);
                    assert!(held.iter().all(|&count| count == times), "{} over {size}: {held:?}", param.name);
                }
            }
        }
    }

    #[test]
    fn a_rank_holds_the_key_value_heads_of_its_queries() {
        let model = model(8, 2, 24, 37);
        for size in [1, 2, 4, 8] {
            for rank in 0..size {
                let part = TensorParallelPart { rank, size };
                let heads = |index: usize| {
                    let slice = model.slice(&model.units[0].params[index], part);
                    slice.start / 4..(slice.start + slice.length) / 4
                };
                let needed: Vec<i64> = heads(2).map(|query| query / 4).collect();
                assert!(needed.iter().all(|head| heads(3).contains(head)), "{part:?}: {needed:?}");
                let sliced = model.sliced(part).unwrap();
                assert_eq!(sliced.num_kv_heads, heads(3).end - heads(3).start);
                assert_eq!(sliced.units[0].params[2].shape, [sliced.num_heads * 4, 10]);
                assert_eq!(sliced.units[0].params[5].shape, [10, sliced.num_heads * 4]);
                assert_eq!(sliced.units[0].params[0].shape, [sliced.vocab_size, 10]);
            }
        }
    }

    #[test]
    fn what_does_not_divide_is_refused_with_the_sizes_that_do() {
        assert_eq!(
            model(9, 3, 1536, 49152).sliced(TensorParallelPart { rank: 0, size: 2 }).unwrap_err().to_string(),
            "2 ranks cannot share 9 heads, 3 key-value heads, a gated width of 1536 and a vocabulary of 49152: tensor \
             parallelism over 1 or 3 ranks can (it divides heads and gated width evenly, and divides or repeats key-value \
             heads)"
        );
        for (model, size) in
            [(model(12, 6, 24, 100), 4), (model(8, 2, 20, 100), 8), (model(4, 4, 8, 5), 4), (model(4, 4, 8, 100), 0)]
        {
            assert!(!model.splits_into(size) && model.splits_into(1), "{size}");
        }
    }
}
