//! What forward and backward passes take: activations, logits, gathered units, gradients on their way.
//!
//! H is hidden, Q the query width, K the key width, F the intermediate width, V the vocabulary; b bytes of the compute dtype,
//! w of the accumulators'. Widths are per token. They follow the code of a pass line by line: what autograd saves for a
//! layer's backward, and which names are still alive when a layer without a graph is at its widest.

use echelon_core::compute::ComputeDtype;
use echelon_core::memory::{CHUNK_LOGITS, PassLoad, Work};
use echelon_core::workload::{Gives, Training};

use super::{Item, RoleJob, Works, largest, transient};

/// Bytes of a sharded pass at one instant.
#[derive(Clone, Copy, Default)]
struct Sharded {
    /// Units whose weights are here.
    gathered: u64,
    /// Gradients of units that are open or on their way, and what a reduction receives.
    gradients: u64,
}

const GATHERED: &str = "compute bytes x the layer units at work and in flight (ZeRO 3)";
const IN_FLIGHT: &str =
    "accumulator bytes x the units whose gradients are made or reduced, and what a reduction receives (ZeRO 2 and 3)";

impl RoleJob<'_> {
    /// A forward pass without a graph: a layer at its widest, or the head.
    pub(super) fn scoring(&self, load: &PassLoad, each: &mut impl FnMut(Item)) {
        let on = Works::of(Work::Score);
        let (model, dtype) = (self.model, self.workload.dtype);
        let (b, w) = (dtype.bytes(), dtype.wide_bytes());
        let gathered =
            |bytes: u64| transient("gathered units", if self.shards_weights() { bytes } else { 0 }, GATHERED, on);
        let layer = [
            transient("activations", self.forward_bytes(load.tokens), self.forward_formula(), on),
            gathered(b * 2 * model.layer_unit),
        ];
        let first = [
            transient("activations", b * load.tokens * model.hidden, "compute bytes x tokens x hidden", on),
            gathered(b * (model.embedding_unit + model.layer_unit)),
        ];
        let read = b * model.hidden * (load.tokens + load.predicted);
        let head = [
            transient("activations", read, "compute bytes x hidden x (tokens + predicted tokens)", on),
            transient(
                "logits",
                2 * w * self.chunk_logits(load),
                "2 x f32 bytes x logits of a chunk (2^24 at most)",
                on,
            ),
            gathered(b * self.head_units()),
        ];
        largest(&[&layer, &first, &head]).iter().for_each(|item| each(*item));
    }

    pub(super) fn training(&self, how: &Training, load: &PassLoad, each: &mut impl FnMut(Item)) {
        let on = Works::of(Work::Learn);
        let (model, narrow) = (self.model, self.is_narrow());
        let nothing: [Item; 0] = [];
        let (kept, kept_formula, recomputed) = self.kept_activations(load.tokens);
        let activations = transient("activations", kept, kept_formula, on);
        let (head, head_gradient) = self.head_instants(how, load, activations);
        let layer = self.layer_instant(load, (activations, recomputed));
        let layer_end = self.layer_end_instant(load, activations);
        let (embedding, embedding_widened) = self.embedding_instants(load);
        let instants: [(&[Item], Sharded); 7] = [
            (&head, self.sharded_head()),
            (if narrow { &head_gradient } else { &nothing }, self.sharded_head()),
            (&layer, self.sharded_layer()),
            (if narrow { &layer_end } else { &nothing }, self.sharded_layer()),
            (&embedding, self.sharded_embedding()),
            (if narrow { &embedding_widened } else { &nothing }, self.sharded(0, model.embedding_unit)),
            (&nothing, self.reduction()),
        ];
        let bytes = |(items, sharded): &(&[Item], Sharded)| {
            items.iter().map(|item| item.bytes).sum::<u64>() + sharded.gathered + sharded.gradients
        };
        let (items, sharded) = instants.iter().max_by_key(|instant| bytes(instant)).expect("seven instants");
        items.iter().for_each(|item| each(*item));
        each(transient("gathered units", sharded.gathered, GATHERED, on));
        each(transient("communication", sharded.gradients, IN_FLIGHT, on));
    }

    /// Whether gradients are made in fewer bytes than they are accumulated in.
    fn is_narrow(&self) -> bool {
        self.workload.dtype.bytes() != self.workload.dtype.wide_bytes()
    }

    /// Bytes of the hidden states of so many tokens.
    fn hidden(&self, tokens: u64) -> u64 {
        self.workload.dtype.bytes() * tokens * self.model.hidden
    }

    /// The head, where all layers are done and none is undone; and, in bf16, its own gradient, made in bf16, then widened.
    fn head_instants(&self, how: &Training, load: &PassLoad, activations: Item) -> ([Item; 3], [Item; 4]) {
        let on = Works::of(Work::Learn);
        let (model, dtype) = (self.model, self.workload.dtype);
        let (b, w) = (dtype.bytes(), dtype.wide_bytes());
        let (logits, has_logits) = (self.chunk_logits(load), u64::from(self.has_logits()));
        let learned = if how.entropy_in_loss { 4 } else { 3 };
        let slopes = if how.entropy_in_loss { w + b } else { 3 * w + b };
        let of_head = transient(
            "head activations",
            3 * self.hidden(load.predicted),
            "3 x compute bytes x predicted tokens x hidden: before and after the norm, and the gradient",
            on,
        );
        let all_logits = transient(
            "logits",
            learned * w * logits,
            "3 x f32 bytes x logits of a chunk (2^24 at most): logits, probabilities, slope; 4 with entropy in the loss",
            on,
        );
        let made = transient("logits", slopes * logits, "(f32: 3 x 4, bf16: 2) x logits of a chunk (2^24 at most)", on);
        let widened = transient(
            "unit gradient",
            if self.is_narrow() { has_logits * (b + w) * model.vocab * model.hidden } else { 0 },
            "(compute + accumulator bytes) x vocabulary x hidden: the head's gradient before it is accumulated",
            on,
        );
        ([activations, of_head, all_logits], [activations, of_head, made, widened])
    }

    /// A layer's backward pass, where its gate's gradients are made.
    fn layer_instant(&self, load: &PassLoad, (activations, recomputed): (Item, u64)) -> [Item; 4] {
        let on = Works::of(Work::Learn);
        let (model, b) = (self.model, self.workload.dtype.bytes());
        [
            activations,
            transient("recomputed layer", recomputed, "what one layer keeps for its backward pass", on),
            transient(
                "activation gradients",
                b * load.tokens * (2 * model.intermediate + model.hidden) + self.hidden(load.predicted),
                "compute bytes x (tokens x (2 intermediate + hidden) + predicted tokens x hidden)",
                on,
            ),
            transient(
                "unit gradient",
                if self.is_narrow() { b * model.intermediate * model.hidden } else { 0 },
                "compute bytes x intermediate x hidden: the first matrix whose gradient is made",
                on,
            ),
        ]
    }

    /// In bf16, the end of a layer: its whole gradient waits to be widened, matrix by matrix.
    fn layer_end_instant(&self, load: &PassLoad, activations: Item) -> [Item; 2] {
        let (model, dtype) = (self.model, self.workload.dtype);
        let (b, w) = (dtype.bytes(), dtype.wide_bytes());
        let one_layer = load.tokens * self.layer_bytes();
        let undone = if self.workload.activation_checkpointing { 0 } else { one_layer };
        let widened = if self.is_narrow() { b * model.layer_unit + w * model.intermediate * model.hidden } else { 0 };
        let formula = "compute bytes x layer unit + accumulator bytes x its largest matrix: widened matrix by matrix";
        [
            Item { bytes: activations.bytes.saturating_sub(undone), ..activations },
            transient("unit gradient", widened, formula, Works::of(Work::Learn)),
        ]
    }

    /// The end of the backward pass, where the embedding's gradient comes as a whole matrix; and, in bf16, where it is
    /// widened, when the unit before it is on its way no more.
    fn embedding_instants(&self, load: &PassLoad) -> ([Item; 2], [Item; 2]) {
        let on = Works::of(Work::Learn);
        let (model, dtype) = (self.model, self.workload.dtype);
        let left = transient(
            "activations",
            4 * self.hidden(load.tokens) + self.hidden(load.predicted),
            "compute bytes x hidden x (4 x tokens + predicted tokens): what is left of them",
            on,
        );
        let gradient = |bytes: u64| {
            transient(
                "unit gradient",
                bytes * model.vocab * model.hidden,
                "compute bytes (bf16: + 4) x vocabulary x hidden: the embedding's gradient before it is accumulated",
                on,
            )
        };
        ([left, gradient(dtype.bytes())], [left, gradient(dtype.bytes() + dtype.wide_bytes())])
    }

    /// What all layers keep for the backward pass, in words, and what one layer keeps more when it is run again.
    fn kept_activations(&self, tokens: u64) -> (u64, &'static str, u64) {
        let model = self.model;
        let (hidden, layer) = (self.workload.dtype.bytes() * tokens * model.hidden, tokens * self.layer_bytes());
        if self.workload.activation_checkpointing {
            let formula =
                "compute bytes x tokens x hidden x (layers + 1): the input of every layer, and the last output";
            return (hidden * (model.num_layers + 1), formula, layer);
        }
        (layer * model.num_layers + hidden, self.layer_formula(), 0)
    }

    /// Whether norms, rotations and gates are one kernel each, which saves what they would make on the way.
    fn is_fused(&self) -> bool {
        self.on_cpu && self.workload.dtype == ComputeDtype::Float32
    }

    /// Bytes that one layer keeps per token for its backward pass: output, the sum in the middle, both norms' outputs;
    /// queries, repeated keys and values, attention's output and its packed copy, a log-sum-exp per head; gate, up and
    /// their product. Without fused kernels also both norms before their weights, and silu of the gate; in bf16 both
    /// norms' f32 inputs, instead of the sum in the middle.
    pub(super) fn layer_bytes(&self) -> u64 {
        let (model, dtype) = (self.model, self.workload.dtype);
        let (b, w) = (dtype.bytes(), dtype.wide_bytes());
        let (h, q, f) = (model.hidden, model.query_width, model.intermediate);
        let scalars = w * (model.num_heads + 2);
        match (self.is_fused(), dtype) {
            (true, _) => b * (4 * h + 5 * q + 3 * f) + scalars,
            (false, ComputeDtype::Bfloat16) => b * (5 * h + 5 * q + 4 * f) + w * 2 * h + scalars,
            (false, _) => b * (6 * h + 5 * q + 4 * f) + scalars,
        }
    }

    fn layer_formula(&self) -> &'static str {
        match (self.is_fused(), self.workload.dtype) {
            (true, _) => {
                "tokens of a micro-batch x (layers x (4 bytes x (4 hidden + 5 query widths + 3 intermediate + heads + 2)) + 4 bytes x hidden)"
            }
            (false, ComputeDtype::Bfloat16) => {
                "tokens of a micro-batch x (layers x (2 bytes x (5 hidden + 5 query widths + 4 intermediate) + 4 bytes x (2 hidden + heads + 2)) + 2 bytes x hidden)"
            }
            (false, _) => {
                "tokens of a micro-batch x (layers x (compute bytes x (6 hidden + 5 query widths + 4 intermediate + heads + 2)) + compute bytes x hidden)"
            }
        }
    }

    /// A layer without a graph at its widest. At the end of the gated part: input, first norm, middle, second norm, product
    /// and sum (6 hidden), queries and attention's output, keys and values, gate, up and their product; without fused
    /// kernels silu of the gate, before the last two hidden states. In attention: input and norm, queries, keys and values,
    /// their repeated copies, output and its packed copy.
    pub(super) fn forward_bytes(&self, tokens: u64) -> u64 {
        let model = self.model;
        let (h, q, k, f) = (model.hidden, model.query_width, model.kv_width, model.intermediate);
        let gated = 2 * q + 2 * k + if self.is_fused() { 6 * h + 3 * f } else { (6 * h + 3 * f).max(4 * h + 4 * f) };
        let repeated = if q == k { 0 } else { 2 * q };
        let attention = 2 * h + 3 * q + 2 * k + repeated;
        self.workload.dtype.bytes() * tokens * gated.max(attention)
    }

    pub(super) fn forward_formula(&self) -> &'static str {
        "compute bytes x tokens at once x (2 query widths + 2 key widths + the wider of 6 hidden + 3 intermediate and, where not fused, 4 hidden + 4 intermediate; or attention's 2 hidden + 5 query widths + 2 key widths)"
    }

    pub fn has_logits(&self) -> bool {
        self.workload.model(self.role).is_some_and(|model| model.gives == Gives::Logprobs)
    }

    /// Logits of one chunk of rows; none for a head that gives one number.
    fn chunk_logits(&self, load: &PassLoad) -> u64 {
        if !self.has_logits() {
            return 0;
        }
        let rows = (u64::from(CHUNK_LOGITS) / self.model.vocab).max(1);
        load.predicted.min(rows) * self.model.vocab
    }

    fn shards_weights(&self) -> bool {
        self.zero_stage == 3 && self.ranks > 1 && !self.offloaded()
    }

    fn shards_gradients(&self) -> bool {
        self.zero_stage >= 2 && self.ranks > 1
    }

    /// Parameters of the units that norm and head read.
    fn head_units(&self) -> u64 {
        self.model.last_unit + if self.model.tied { self.model.embedding_unit } else { 0 }
    }

    fn sharded(&self, gathered: u64, gradients: u64) -> Sharded {
        let dtype = self.workload.dtype;
        Sharded {
            gathered: if self.shards_weights() { dtype.bytes() * gathered } else { 0 },
            gradients: if self.shards_gradients() { dtype.wide_bytes() * gradients } else { 0 },
        }
    }

    fn sharded_head(&self) -> Sharded {
        self.sharded(self.head_units(), self.head_units())
    }

    /// A layer at work and the next one gathered; gradients of the layer, and of the unit before it on their way, and what is
    /// received for that: of a layer, or of the head's own unit. A tied embedding's are open from the head on.
    fn sharded_layer(&self) -> Sharded {
        let model = self.model;
        let open = if model.tied { model.embedding_unit } else { 0 };
        self.sharded(2 * model.layer_unit, open + model.layer_unit + 2 * model.layer_unit.max(model.last_unit))
    }

    fn sharded_embedding(&self) -> Sharded {
        self.sharded(0, self.model.embedding_unit + 2 * self.model.layer_unit)
    }

    /// The largest unit's gradients on their way: from stage 1 on every rank receives its part from all.
    fn reduction(&self) -> Sharded {
        let unit = self.model.largest_unit * self.workload.dtype.wide_bytes();
        let gradients = match self.zero_stage {
            _ if self.ranks == 1 => 0,
            0 => 0, // summed in place
            1 => unit,
            _ => 2 * unit,
        };
        Sharded { gathered: 0, gradients }
    }
}
