//! A decoder-only transformer over packed tokens. One computation serves training, scoring and generation: they differ
//! in how a layer attends. One rank has the whole model, or a slice of it ([`crate::tensor_parallel`]).

use std::collections::HashMap;

use echelon_core::pack::PackedRows;
use echelon_core::weight_layout::WeightLayout;
use echelon_core::zero::Backbone;
use tch::{Kind, TchError, Tensor};

use crate::config::DecoderConfig;
use crate::error::{ModelError, Result};
use crate::layers::{Linear, RmsNorm, RotaryTable, inverse_frequencies, packed_attention, swiglu};
use crate::tensor_parallel::{TensorParallel, VocabularySlice};

/// Gives each parameter by its Hugging Face name, in the shape that [`DecoderConfig::shape`] lists, or that of the rank's
/// slice.
pub type Load<'a> = dyn FnMut(&str) -> Result<Tensor> + 'a;

/// How a layer attends: q `[N, heads, D]`, k and v `[N, kv_heads, D]` and the layer's window to `[N, heads, D]`; the heads
/// are those of this rank.
pub type Attend<'a> = dyn FnMut(&Tensor, &Tensor, &Tensor, Option<i64>) -> Tensor + 'a;

/// Embedding, layers and final norm; tensors are handles, cloning shares the weights.
#[derive(Debug)]
pub struct Decoder {
    config: DecoderConfig,
    vocabulary: VocabularySlice,
    /// Key-value heads of this rank.
    num_kv_heads: i64,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    inverse_frequencies: Tensor,
}

#[derive(Debug)]
struct Layer {
    input_norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    q_norm: Option<RmsNorm>,
    k_norm: Option<RmsNorm>,
    mlp_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
    window: Option<i64>,
}

impl Decoder {
    /// Takes the tensors that `load` gives; none is copied.
    pub fn new(config: &DecoderConfig, load: &mut Load) -> Result<Decoder> {
        Decoder::sliced(config, &TensorParallel::solo(), load)
    }

    /// The slice of one rank of `tensor_parallel`: `load` gives each parameter in the shape of the rank's slice (a
    /// [`Checkpoint::slice_loader`], or a map of tensors that someone fills in place); none is copied.
    ///
    /// Every rank of the group calls the same methods with the same inputs.
    ///
    /// # Errors
    /// A model that so many ranks cannot share; those of `load`.
    ///
    /// # Panics
    /// A tensor of another shape.
    ///
    /// [`Checkpoint::slice_loader`]: crate::checkpoint::Checkpoint::slice_loader
    pub fn sliced(config: &DecoderConfig, tensor_parallel: &TensorParallel, load: &mut Load) -> Result<Decoder> {
        let whole = config.shape();
        let shape = whole.sliced(tensor_parallel.part()).map_err(|source| {
            let model = format!("a decoder of {} layers, {} wide", config.num_layers, config.hidden_size);
            ModelError::Split { model, source }
        })?;
        let shapes: HashMap<&str, &[i64]> =
            shape.units.iter().flat_map(|unit| &unit.params).map(|p| (p.name.as_str(), p.shape.as_slice())).collect();
        let load: &mut Load = &mut |name| {
            let tensor = load(name)?;
            assert_eq!(tensor.size(), shapes[name], "`{name}` in the shape that {tensor_parallel:?} holds");
            Ok(tensor)
        };
        let embedding = load("model.embed_tokens.weight")?;
        let first = tensor_parallel.rank() == 0;
        let layer = |index| Layer::new(config, index, first, load);
        let layers = (0..config.num_layers).map(layer).collect::<Result<_>>()?;
        let norm = RmsNorm { weight: load("model.norm.weight")?, eps: config.norm_eps };
        let inverse_frequencies = inverse_frequencies(config.rope, config.head_dim).to_device(embedding.device());
        Ok(Decoder {
            config: config.clone(),
            vocabulary: VocabularySlice::of(&whole, tensor_parallel),
            num_kv_heads: shape.num_kv_heads,
            embedding,
            layers,
            norm,
            inverse_frequencies,
        })
    }

    /// The same model with its linear layers in `layout` for decoding `rows` sequences at once (see [`Linear::packed`]):
    /// a second copy of their weights, where the layout is not the plain one.
    ///
    /// # Errors
    /// libtorch's: memory runs out, or this processor lacks what the layout needs.
    pub fn packed(&self, rows: i64, layout: WeightLayout) -> std::result::Result<Decoder, TchError> {
        Ok(Decoder {
            config: self.config.clone(),
            vocabulary: self.vocabulary.clone(),
            num_kv_heads: self.num_kv_heads,
            embedding: self.embedding.detach(),
            layers: self
                .layers
                .iter()
                .map(|layer| layer.packed(rows, layout))
                .collect::<std::result::Result<_, _>>()?,
            norm: self.norm.shallow_clone(),
            inverse_frequencies: self.inverse_frequencies.shallow_clone(),
        })
    }

    /// That of the whole model.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The ranks that share this model.
    pub fn tensor_parallel(&self) -> &TensorParallel {
        self.vocabulary.tensor_parallel()
    }

    /// This rank's part of the vocabulary.
    pub fn vocabulary(&self) -> &VocabularySlice {
        &self.vocabulary
    }

    /// Key-value heads of this rank.
    pub fn num_kv_heads(&self) -> i64 {
        self.num_kv_heads
    }

    /// `[V, H]`, this rank's rows of it; with tied embeddings also the head's matrix.
    pub fn embedding(&self) -> &Tensor {
        &self.embedding
    }

    pub fn kind(&self) -> Kind {
        self.embedding.kind()
    }

    /// Embeds `[N]` token ids to `[N, H]`.
    ///
    /// # Errors
    /// Another rank's, where ranks share the model.
    pub fn embed_tokens(&self, token_ids: &Tensor) -> echelon_core::Result<Tensor> {
        self.vocabulary.embed(&self.embedding, token_ids)
    }

    /// Rotary tables for `[N]` positions.
    pub fn rotary(&self, positions: &Tensor) -> RotaryTable {
        RotaryTable::new(&self.inverse_frequencies, positions, self.kind())
    }

    /// One layer: `[N, H]` to `[N, H]`. `attend` gets q `[N, heads, D]`, k and v `[N, kv_heads, D]` with rotary positions
    /// applied, and the layer's window, and returns `[N, heads, D]`.
    ///
    /// # Errors
    /// Another rank's, where ranks share the model.
    pub fn layer_with(
        &self,
        index: usize,
        hidden: &Tensor,
        rotary: &RotaryTable,
        attend: &mut Attend,
    ) -> echelon_core::Result<Tensor> {
        let layer = &self.layers[index];
        let x = layer.input_norm.forward(hidden);
        let heads = |linear: &Linear, norm: &Option<RmsNorm>| {
            let projected = linear.forward(&x).view([x.size()[0], -1, self.config.head_dim]);
            norm.as_ref().map_or_else(|| projected.shallow_clone(), |norm| norm.forward(&projected))
        };
        let q = rotary.rotate(&heads(&layer.q, &layer.q_norm));
        let k = rotary.rotate(&heads(&layer.k, &layer.k_norm));
        let v = heads(&layer.v, &None);
        let attended = attend(&q, &k, &v, layer.window);
        let over_ranks = self.tensor_parallel();
        let output = layer.o.forward(&attended.reshape([x.size()[0], -1]));
        let hidden = hidden + over_ranks.sum(format_args!("attention of layer {index}"), output)?;
        let x = layer.mlp_norm.forward(&hidden);
        let output = layer.down.forward(&swiglu(&layer.gate.forward(&x), &layer.up.forward(&x)));
        Ok(hidden + over_ranks.sum(format_args!("mlp of layer {index}"), output)?)
    }
}

impl Backbone for Decoder {
    type Context = RotaryTable;

    fn context(&self, batch: &PackedRows) -> RotaryTable {
        self.rotary(&batch.positions)
    }

    fn num_layers(&self) -> usize {
        self.layers.len()
    }

    fn embed(&self, batch: &PackedRows) -> echelon_core::Result<Tensor> {
        self.embed_tokens(&batch.token_ids)
    }

    fn layer(
        &self,
        index: usize,
        hidden: &Tensor,
        batch: &PackedRows,
        rotary: &RotaryTable,
    ) -> echelon_core::Result<Tensor> {
        self.layer_with(index, hidden, rotary, &mut |q, k, v, window| packed_attention(q, k, v, &batch.lengths, window))
    }

    fn norm(&self, hidden: &Tensor) -> Tensor {
        self.norm.forward(hidden)
    }

    fn any_stops(&self, stop: bool) -> echelon_core::Result<bool> {
        self.tensor_parallel().any("stop", stop)
    }
}

impl Layer {
    /// The biases of outputs that are summed over ranks are the `first` one's to add.
    fn new(config: &DecoderConfig, index: usize, first: bool, load: &mut Load) -> Result<Layer> {
        let mut load = |name: &str| load(&format!("model.layers.{index}.{name}"));
        let eps = config.norm_eps;
        let norm = |name: &str, load: &mut Load| Ok::<_, ModelError>(RmsNorm { weight: load(name)?, eps });
        let linear = |name: &str, bias: bool, load: &mut Load| -> Result<Linear> {
            let weight = load(&format!("{name}.weight"))?;
            let bias = bias.then(|| load(&format!("{name}.bias"))).transpose()?;
            Ok(Linear::new(weight, bias))
        };
        let summed = |name: &str, bias: bool, load: &mut Load| {
            let whole = linear(name, bias, load)?;
            Ok::<_, ModelError>(if first { whole } else { Linear::new(whole.weight, None) })
        };
        let load: &mut Load = &mut load;
        Ok(Layer {
            input_norm: norm("input_layernorm.weight", load)?,
            q: linear("self_attn.q_proj", config.qkv_bias, load)?,
            k: linear("self_attn.k_proj", config.qkv_bias, load)?,
            v: linear("self_attn.v_proj", config.qkv_bias, load)?,
            o: summed("self_attn.o_proj", config.output_bias, load)?,
            q_norm: config.qk_norm.then(|| norm("self_attn.q_norm.weight", load)).transpose()?,
            k_norm: config.qk_norm.then(|| norm("self_attn.k_norm.weight", load)).transpose()?,
            mlp_norm: norm("post_attention_layernorm.weight", load)?,
            gate: linear("mlp.gate_proj", config.mlp_bias, load)?,
            up: linear("mlp.up_proj", config.mlp_bias, load)?,
            down: summed("mlp.down_proj", config.mlp_bias, load)?,
            window: config.windows[index],
        })
    }

    fn packed(&self, rows: i64, layout: WeightLayout) -> std::result::Result<Layer, TchError> {
        let packed = |linear: &Linear| linear.packed(rows, layout);
        let norm = |norm: &Option<RmsNorm>| norm.as_ref().map(RmsNorm::shallow_clone);
        Ok(Layer {
            input_norm: self.input_norm.shallow_clone(),
            q: packed(&self.q)?,
            k: packed(&self.k)?,
            v: packed(&self.v)?,
            o: packed(&self.o)?,
            q_norm: norm(&self.q_norm),
            k_norm: norm(&self.k_norm),
            mlp_norm: self.mlp_norm.shallow_clone(),
            gate: packed(&self.gate)?,
            up: packed(&self.up)?,
            down: packed(&self.down)?,
            window: self.window,
        })
    }
}
