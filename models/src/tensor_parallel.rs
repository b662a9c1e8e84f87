//! Tensor parallelism: ranks that share one model, each with a slice of every large parameter.
//!
//! A layer goes through two pairs of linears. The first of a pair (q, k, v; gate, up) is divided by rows: a rank computes
//! its heads, or its part of the gated width. The second (o; down) is divided by columns: a rank computes what its part
//! adds to the output, and the sum over ranks is the output. Embedding and head are divided by rows of the vocabulary: a
//! token's embedding comes from the rank that has it, logits stay where they are made. For generation and frozen roles;
//! what learns is divided by ZeRO.
//!
//! * **TP-1** What a rank holds of a parameter is a function of the model's shape, rank and size
//!   ([`ModelShape::slice`](echelon_core::shape::ModelShape::slice)): planner, loader and weight sync share it.
//! * **TP-2** A rank holds its slices and what is replicated (norms, biases of summed outputs, score heads): slices of rows
//!   stay in the mapped file, slices of columns are copied once, the KV cache has the rank's key-value heads alone. Test:
//!   `tests/tensor_parallel.rs`, `generation/tests/tensor_parallel.rs`.
//! * **TP-3** What every rank has, it has in the same bits: hidden states after a sum, log-probs, drawn tokens. Tests: the
//!   same.
//! * **TP-4** What ranks decide (a token, an end, a stop, a refusal) they decide from what a collective brought to all of
//!   them, so that they run the same operations and end together. Test: `generation/tests/tensor_parallel.rs`.
//! * **TP-5** A group of one runs no collective, and computes and copies nothing more than a model without one.
//! * **TP-6** No rank has a logit of another's part of the vocabulary. The one exception is sampling with top-p, which is
//!   defined by the order of all tokens: their probabilities are gathered.

use std::fmt::{self, Debug, Formatter};

use echelon_core::process_group::ProcessGroup;
use echelon_core::shape::{ModelShape, TensorParallelPart};
use echelon_core::{Error, Result};
use tch::{Kind, Tensor};

/// The ranks that share a model, seen from one of them. Clones are handles of the same group.
#[derive(Clone)]
pub struct TensorParallel {
    group: ProcessGroup,
}

impl Debug for TensorParallel {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        write!(f, "TensorParallel(rank {} of {})", self.rank(), self.size())
    }
}

impl TensorParallel {
    pub fn new(group: ProcessGroup) -> TensorParallel {
        TensorParallel { group }
    }

    /// One rank that holds the whole model.
    pub fn solo() -> TensorParallel {
        TensorParallel::new(ProcessGroup::solo())
    }

    pub fn rank(&self) -> usize {
        self.group.rank()
    }

    pub fn size(&self) -> usize {
        self.group.size()
    }

    pub fn is_solo(&self) -> bool {
        self.size() == 1
    }

    pub fn part(&self) -> TensorParallelPart {
        TensorParallelPart { rank: self.rank(), size: self.size() }
    }

    pub fn group(&self) -> &ProcessGroup {
        &self.group
    }

    /// The sum over ranks of what each adds to an output, the same bits on every rank.
    ///
    /// # Errors
    /// A rank that is gone or does not come; a tensor that wants a gradient.
    pub fn sum(&self, operation: fmt::Arguments, part: Tensor) -> Result<Tensor> {
        if self.is_solo() {
            return Ok(part);
        }
        if part.requires_grad() {
            let what = "there is no backward pass through tensor-parallel layers: train the whole model under ZeRO";
            return Err(Error::Refused(format!("{operation}: {what}")));
        }
        let part = part.contiguous();
        self.group.all_reduce_sum(&operation.to_string(), &part)?;
        Ok(part)
    }

    /// Every rank's tensor, of one shape on all: `[size, …]`.
    ///
    /// # Errors
    /// A rank that is gone or does not come.
    pub fn gather(&self, operation: &str, mine: &Tensor) -> Result<Tensor> {
        let mut shape = mine.size();
        shape.insert(0, self.size() as i64);
        if self.is_solo() || mine.numel() == 0 {
            return Ok(mine.unsqueeze(0).f_expand(&shape, false)?);
        }
        let gathered = Tensor::f_empty(&shape, (mine.kind(), mine.device()))?;
        let flat = |tensor: &Tensor| tensor.contiguous().view([-1]);
        self.group.start_all_gather(operation, &flat(&gathered), &flat(mine))?.wait()?;
        Ok(gathered)
    }

    /// Whether any rank says so.
    ///
    /// # Errors
    /// A rank that is gone or does not come.
    pub fn any(&self, operation: &str, mine: bool) -> Result<bool> {
        if self.is_solo() {
            return Ok(mine);
        }
        self.group.any(operation, mine)
    }

    /// What this rank made of a call, once it is known that every rank made something of the same call: `call` is equal on
    /// ranks that were called alike.
    ///
    /// # Errors
    /// This rank's own error; that of another rank; ranks that were called differently.
    pub fn agree<T>(&self, operation: &str, call: u64, outcome: Result<T>) -> Result<T> {
        if self.is_solo() {
            return outcome;
        }
        let told = match &outcome {
            Ok(_) => call.to_le_bytes().to_vec(),
            Err(error) => format!("refused: {error}").into_bytes(),
        };
        let all = self.group.gather_bytes(operation, &told)?;
        let value = outcome?;
        for (rank, theirs) in all.iter().enumerate() {
            if theirs.len() > size_of::<u64>() {
                let theirs = String::from_utf8_lossy(theirs);
                return Err(Error::Refused(format!("{operation}: rank {rank} of {} {theirs}", self.size())));
            }
            if *theirs != told {
                let what = "were called with different inputs or settings: call every rank of a group alike";
                return Err(Error::Refused(format!("{operation}: ranks {} and {rank} {what}", self.rank())));
            }
        }
        Ok(value)
    }
}

/// A rank's part of the vocabulary: the rows of embedding and head, and the columns of logits, that it has.
#[derive(Clone, Debug)]
pub struct VocabularySlice {
    tensor_parallel: TensorParallel,
    start: i64,
    length: i64,
    full: i64,
}

impl VocabularySlice {
    /// The part of the rank of `tensor_parallel`.
    pub fn of(shape: &ModelShape, tensor_parallel: &TensorParallel) -> VocabularySlice {
        let (start, length) = shape.vocabulary(tensor_parallel.part());
        VocabularySlice { tensor_parallel: tensor_parallel.clone(), start, length, full: shape.vocab_size }
    }

    /// All of a vocabulary.
    pub fn whole(size: i64) -> VocabularySlice {
        VocabularySlice { tensor_parallel: TensorParallel::solo(), start: 0, length: size, full: size }
    }

    pub fn tensor_parallel(&self) -> &TensorParallel {
        &self.tensor_parallel
    }

    pub fn is_whole(&self) -> bool {
        self.tensor_parallel.is_solo()
    }

    /// The first token of this part.
    pub fn start(&self) -> i64 {
        self.start
    }

    /// Tokens of this part.
    pub fn length(&self) -> i64 {
        self.length
    }

    /// Tokens of the vocabulary.
    pub fn full(&self) -> i64 {
        self.full
    }

    /// Embeds `[N]` token ids to `[N, H]` with this part's rows `[length, H]`.
    pub fn embed(&self, rows: &Tensor, token_ids: &Tensor) -> Result<Tensor> {
        let look_up = |ids: &Tensor| Tensor::embedding(rows, ids, -1, false, false);
        if self.is_whole() {
            return Ok(look_up(token_ids));
        }
        let (ids, others) = self.own(token_ids);
        let embedded = look_up(&ids).masked_fill_(&others.unsqueeze(1), 0.0);
        self.tensor_parallel.sum(format_args!("embedding"), embedded)
    }

    /// Token ids counted from this part's first (0 for those of other ranks), and which are other ranks'.
    pub fn own(&self, token_ids: &Tensor) -> (Tensor, Tensor) {
        let ids = token_ids - self.start;
        let others = ids.lt(0).logical_or(&ids.ge(self.length));
        (ids.masked_fill(&others, 0), others)
    }

    /// `[R]` log-sum-exps over the vocabulary and `[R]` numbers that one rank each has (0 on the others), from each rank's
    /// over its part.
    pub fn joined(&self, operation: &str, log_sum_exp: Tensor, chosen: Tensor) -> Result<(Tensor, Tensor)> {
        if self.is_whole() {
            return Ok((log_sum_exp, chosen));
        }
        let all = self.tensor_parallel.gather(operation, &Tensor::stack(&[log_sum_exp, chosen], 0))?;
        Ok((all.select(1, 0).logsumexp(0, false), all.select(1, 1).sum_dim_intlist(0, false, None::<Kind>)))
    }
}
