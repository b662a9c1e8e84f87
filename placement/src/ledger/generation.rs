//! What the generator's engine takes: weights of its own, their layout for decoding, the KV cache, prefill and sampling.

use echelon_core::compute::ComputeDtype;
use echelon_core::memory::{DecodeLoad, Work};

use super::{Item, RoleJob, SYNC_BUCKET_BYTES, Works, largest, resident, transient};

impl RoleJob<'_> {
    /// Bytes that one more slot of the generator takes.
    pub fn slot_bytes(&self) -> u64 {
        let per_token = self.model.kv_bytes_per_token(self.workload.dtype, self.tensor_parallel);
        let cached = per_token * self.workload.max_tokens() as u64;
        (cached + self.sampling_bytes() * self.model.vocab).max(1)
    }

    pub(super) fn generation(&self, load: &DecodeLoad, each: &mut impl FnMut(Item)) {
        let (model, dtype, size) = (self.model, self.workload.dtype, self.tensor_parallel);
        let on = Works::of(Work::Generate);
        if !self.shares_weights {
            let weights = dtype.bytes() * model.tensor_parallel_params(size);
            let formula = "compute bytes x (split parameters / tensor-parallel size + replicated ones)";
            each(resident("weights", weights, formula, on.and(Work::Publish)));
            let bucket = 2 * SYNC_BUCKET_BYTES.min(weights);
            let formula = "2 x the smaller of 64 MiB and the weights";
            each(transient("sync buckets", bucket, formula, Works::of(Work::Publish)));
        }
        let packed = if load.packs { dtype.bytes() * self.packed_params() } else { 0 };
        let packed = |while_prefilling: bool| {
            let formula = "compute bytes x matrices of layers and head: their layout for decoding";
            transient("packed weights", if while_prefilling && !load.refills { 0 } else { packed }, formula, on)
        };
        let per_token = model.kv_bytes_per_token(dtype, size);
        let cache = |tokens: u64| {
            let formula = "slots x tokens with room in a slot x 2 x layers x key-value width x compute bytes / tensor-parallel size";
            transient("KV cache", load.slots * tokens * per_token, formula, on)
        };
        let prefilled = cache(if load.refills { load.slot_tokens } else { load.prompt_slot_tokens });
        let prefill = [
            packed(true),
            prefilled,
            transient(
                "prefill activations",
                self.forward_bytes(load.prefill_tokens) / size as u64,
                self.forward_formula(),
                on,
            ),
        ];
        let first_tokens = [
            packed(true),
            prefilled,
            transient(
                "sampling",
                model.vocab
                    * (dtype.wide_bytes() * (2 * load.prefill_prompts + load.slots))
                        .max(self.sampling_bytes() * load.slots),
                "vocabulary x the larger of f32 bytes x (2 prompts + slots) and (3 x f32 bytes + 2 x 8) x slots",
                on,
            ),
        ];
        let step = [
            packed(false),
            cache(load.slot_tokens),
            transient(
                "sampling",
                self.sampling_bytes() * load.slots * model.vocab,
                "(3 x f32 bytes + 2 x 8) x slots x vocabulary: logits, log-probs, probabilities, their integers and sums",
                on,
            ),
        ];
        largest(&[&prefill, &first_tokens, &step]).iter().for_each(|item| each(*item));
    }

    /// Bytes of sampling per slot and token of the vocabulary; cuts by top-k, top-p and min-p come on top.
    fn sampling_bytes(&self) -> u64 {
        3 * self.workload.dtype.wide_bytes() + 16
    }

    /// Parameters with a second layout for decoding.
    fn packed_params(&self) -> u64 {
        let model = self.model;
        let matrices = (model.layer_params + model.vocab * model.hidden) / self.tensor_parallel as u64;
        if self.on_cpu && self.workload.dtype != ComputeDtype::Float64 { matrices } else { 0 }
    }
}
