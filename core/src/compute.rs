//! The recipe's table of numbers and memory, as every trained role has them.

use echelon_schema::{Auto, MOST, above, between, choice, table};
use tch::Kind;

table! {
    /// Numbers and memory of training. None of these keys but `dtype` and `max_grad_norm` changes a result.
    pub struct Compute {
        /// Tokens per forward and backward pass on one device; a longer sequence goes alone.
        pub tokens_per_micro_batch: usize = 16192, in between(1.0, MOST);
        /// Type that models compute in; `auto` is bfloat16 on CUDA, else float32.
        pub dtype: Auto<ComputeDtype> = Auto::Auto;
        /// What is split over the ranks: 1 optimizer state, 2 also gradients, 3 also parameters.
        pub zero_stage: Auto<usize> = Auto::Auto, in between(0.0, 3.0);
        /// Keep master weights and moments in host memory and step there; `false` leaves that to the plan where there is one.
        pub adam_offload: bool = false;
        /// Recompute activations in the backward pass instead of keeping them.
        pub activation_checkpointing: bool = false;
        /// The same run gives the same bits again: `auto` is so on a CPU, and not on CUDA, where it costs speed.
        pub deterministic: Auto<bool> = Auto::Auto;
        /// Gradients are scaled down to this global norm.
        pub max_grad_norm: Option<f64> = Some(1.0), in above(0.0);
    }
}

choice! {
    /// Type that models compute in.
    #[derive(serde::Serialize, serde::Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum ComputeDtype, auto "bfloat16 on CUDA, else float32." {
        /// 32 bits.
        Float32 = "float32",
        /// 16 bits, with float32 master weights.
        Bfloat16 = "bfloat16",
        /// 64 bits, for checking numbers.
        Float64 = "float64",
    }
}

impl ComputeDtype {
    /// Bytes of a weight or an activation.
    pub fn bytes(self) -> u64 {
        match self {
            ComputeDtype::Bfloat16 => 2,
            ComputeDtype::Float32 => 4,
            ComputeDtype::Float64 => 8,
        }
    }

    /// Bytes of an accumulated gradient, of a moment, and of a logit.
    pub fn wide_bytes(self) -> u64 {
        self.bytes().max(4)
    }

    /// As libtorch knows it.
    pub fn kind(self) -> Kind {
        match self {
            ComputeDtype::Float32 => Kind::Float,
            ComputeDtype::Bfloat16 => Kind::BFloat16,
            ComputeDtype::Float64 => Kind::Double,
        }
    }
}
