//! Training moves some parameters and leaves others: those that it moves as a plain loop moves them, for every ZeRO stage,
//! the others bit for bit. Ranks are threads here, each with its own sockets: to c10d they are processes.

use std::collections::HashMap;
use std::path::Path;

use echelon_core::data::Rows;
use echelon_core::pack::PackedRows;
use echelon_core::process_group::{MeetingPoint, Patience, ProcessGroup};
use echelon_core::random::{Domain, uniform};
use echelon_core::role::Role;
use echelon_core::shape::{ModelShape, ParamShape};
use echelon_core::zero::{
    Backbone, OptimizerConfig, PassConfig, Sharding, StatePart, TensorFile, TensorWriter, Trainable, TrainingState,
    ZeroStage,
};
use echelon_models::config::DecoderConfig;
use echelon_models::decoder::Decoder;
use echelon_models::head::{LogprobHead, LogprobOutput};
use tch::{Device, Kind, Tensor};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/checkpoints");
const LAYERS: usize = 4;
const STEPS: usize = 3;
const LR: f64 = 1e-2;
const ADAMW: OptimizerConfig =
    OptimizerConfig { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.01, max_grad_norm: 0.3 };

/// Which parameters training leaves, by name.
type Freezes = fn(&str) -> bool;

fn every_other_mlp(name: &str) -> bool {
    name.contains(".mlp.") && (name.contains("layers.1.") || name.contains("layers.3."))
}

/// Units of which nothing is trained, and a head whose matrix is not: where it is tied that is the embedding.
fn whole_units(name: &str) -> bool {
    every_other_mlp(name) || ["layers.2.", "embed_tokens", "lm_head"].iter().any(|part| name.contains(part))
}

type Policy = Trainable<Decoder, LogprobHead>;

/// A golden model's sizes with more layers, and what is frozen of it.
struct Model {
    config: DecoderConfig,
    shape: ModelShape,
}

impl Model {
    fn new(name: &str, freezes: Freezes) -> Model {
        let config = DecoderConfig::read(&Path::new(GOLDEN).join(name)).unwrap();
        let config = DecoderConfig { num_layers: LAYERS, windows: vec![None; LAYERS], ..config };
        let mut shape = config.shape();
        for param in shape.units.iter_mut().flat_map(|unit| &mut unit.params) {
            param.trainable = !freezes(&param.name);
        }
        Model { config, shape }
    }

    fn params(&self) -> impl Iterator<Item = &ParamShape> {
        self.shape.units.iter().flat_map(|unit| &unit.params)
    }

    fn weight(&self, name: &str) -> Tensor {
        let param = self.params().find(|param| param.name == name).unwrap();
        let seed = name.bytes().fold(1.0, |seed, byte| (seed * 1.7 + f64::from(byte)) % 1000.0);
        let waves = (Tensor::arange(param.numel(), tch::kind::DOUBLE_CPU) * 12.9898 + seed).sin() * 0.2;
        let waves = waves.view(param.shape.as_slice());
        if name.ends_with("norm.weight") { waves + 1.0 } else { waves }
    }

    fn head(&self) -> &'static str {
        if self.config.tied_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" }
    }

    fn state(&self, kind: Kind, sharding: &Sharding) -> TrainingState {
        let load = &mut |name: &str| Ok(self.weight(name));
        TrainingState::new(Role::Actor, &self.shape, ADAMW, (kind, Device::Cpu), sharding, load).unwrap()
    }

    /// Half of the cases keep the graphs and see a rank's rows at once.
    fn policy(&self, state: TrainingState, recompute: bool) -> Policy {
        let params = state.params();
        let model = Decoder::new(&self.config, &mut |name| Ok(params[name].weight.shallow_clone())).unwrap();
        let head = LogprobHead::trained(params[self.head()].shallow_clone(), 1.0);
        let tokens_per_micro_batch = if recompute { 12 } else { 1000 };
        let pass = PassConfig { device: Device::Cpu, tokens_per_micro_batch, activation_checkpointing: recompute };
        Trainable::new(state, model, head, pass)
    }

    /// The gradient norms and the weights of plain autograd on one graph, and AdamW as its paper has it.
    fn plain_loop(&self) -> (Vec<f64>, HashMap<String, Tensor>) {
        let mut weights: HashMap<_, _> = self.params().map(|p| (p.name.clone(), self.weight(&p.name))).collect();
        let mut moments: HashMap<String, [Tensor; 2]> =
            weights.iter().map(|(name, weight)| (name.clone(), [(); 2].map(|()| weight.zeros_like()))).collect();
        let mut norms = Vec::new();
        for step in 0..STEPS {
            let leaf = |p: &ParamShape| (p.name.clone(), weights[&p.name].copy().set_requires_grad(p.trainable));
            let leaves: HashMap<_, _> = self.params().map(leaf).collect();
            self.plain_loss(&leaves, step).backward();
            let trained: Vec<_> = self.params().filter(|p| p.trainable).map(|p| p.name.as_str()).collect();
            let squares = trained.iter().map(|&name| leaves[name].grad().square().sum(Kind::Double).double_value(&[]));
            norms.push(squares.sum::<f64>().sqrt());
            let scale = (ADAMW.max_grad_norm / (norms[step] + 1e-6)).min(1.0);
            let (beta1, beta2) = ADAMW.betas;
            for name in trained {
                let (grad, weight) = (leaves[name].grad() * scale, &weights[name]);
                let [mean, square] = &moments[name];
                let mean = mean * beta1 + &grad * (1.0 - beta1);
                let square = square * beta2 + grad.square() * (1.0 - beta2);
                let at = step as i32 + 1;
                let (mean_hat, square_hat) = (&mean / (1.0 - beta1.powi(at)), &square / (1.0 - beta2.powi(at)));
                let decay = if weight.dim() > 1 { ADAMW.weight_decay } else { 0.0 };
                let moved = weight * (1.0 - LR * decay) - mean_hat / (square_hat.sqrt() + ADAMW.eps) * LR;
                weights.insert(name.into(), moved);
                moments.insert(name.into(), [mean, square]);
            }
        }
        (norms, weights)
    }

    fn plain_loss(&self, leaves: &HashMap<String, Tensor>, step: usize) -> Tensor {
        let model = Decoder::new(&self.config, &mut |name| Ok(leaves[name].shallow_clone())).unwrap();
        let batch = PackedRows::new(&Rows::of_tokens(&rows(step)), Device::Cpu);
        let context = model.context(&batch);
        let embedded = model.embed(&batch).unwrap();
        let layer = |hidden, index| model.layer(index, &hidden, &batch, &context).unwrap();
        let hidden = model.norm(&(0..LAYERS).fold(embedded, layer).index_select(0, &batch.predecessors));
        let logprobs = hidden.matmul(&leaves[self.head()].tr()).log_softmax(-1, Kind::Double);
        -logprobs.gather(1, &batch.targets.unsqueeze(1), false).sum(Kind::Double) / num_tokens(step)
    }

    /// Asserts that training gave the plain loop's norms and weights, and left the others.
    fn assert_plain(&self, what: &str, norms: &[f64], state: &TrainingState) {
        let (expected_norms, expected) = self.plain_loop();
        assert!(expected_norms[0] > ADAMW.max_grad_norm, "gradients are clipped: {expected_norms:?}");
        for (found, expected) in norms.iter().zip(&expected_norms) {
            assert!((found - expected).abs() < 1e-9, "{what}: gradient norm {found}, plain {expected}");
        }
        let found: HashMap<_, _> = state.tensors().unwrap().into_iter().collect();
        for param in self.params() {
            let (name, weight) = (&param.name, &found[&format!("weights.{}", param.name)]);
            if param.trainable {
                let off = (weight - &expected[name]).abs().max().double_value(&[]);
                assert!(off < 1e-9, "{what}: {name} is off by {off:e}");
                assert_ne!(*weight, self.weight(name), "{what}: {name} moves");
            } else {
                assert_eq!(*weight, self.weight(name), "{what}: {name} stays");
            }
            for part in ["exp_avg", "exp_avg_sq"] {
                assert_eq!(found.contains_key(&format!("{part}.{name}")), param.trainable, "{what}: {part} of {name}");
            }
        }
    }
}

/// The rows of one mini-batch, the same on every rank; a rank takes every `ranks`-th.
fn rows(step: usize) -> Vec<(Vec<i64>, Vec<bool>)> {
    let row = |index: usize| {
        let number = |at: u32| uniform(step as u64, Domain::Data, index as u64, at, 0);
        let length = 3 + (number(0) * 9.0) as usize;
        let ids = (0..length).map(|at| (3.0 + number(at as u32 + 1) * 100.0) as i64).collect();
        (ids, (0..length).map(|at| at > 1).collect())
    };
    (0..7).map(row).collect()
}

fn num_tokens(step: usize) -> f64 {
    rows(step).iter().flat_map(|(_, mask)| mask).filter(|&&wanted| wanted).count() as f64
}

/// One optimizer step; returns the gradient norm.
fn learn(policy: &mut Policy, step: usize) -> f64 {
    let group = policy.state.sharding().group.clone();
    let mine: Vec<_> = rows(step).into_iter().skip(group.rank()).step_by(group.size()).collect();
    let mine = Rows::of_tokens(&mine);
    for batch in policy.micro_batches(&mine.lengths, 1).unwrap() {
        let loss_of = |output: &LogprobOutput| Ok(-output.logprobs.sum(Kind::Double) / num_tokens(step));
        policy.forward_backward(&mine.select(&batch), loss_of).unwrap();
    }
    policy.optimizer_step(LR).unwrap()
}

/// Runs `each` on the threads of `size` ranks of one group.
fn ranks(size: usize, each: impl Fn(ProcessGroup) + Sync) {
    let point = MeetingPoint::serve("127.0.0.1", 0).unwrap();
    let port = point.port();
    std::thread::scope(|scope| {
        for rank in 0..size {
            let each = &each;
            scope.spawn(move || {
                tch::set_num_threads(1);
                let patience = Patience::default();
                let point = MeetingPoint::join("127.0.0.1", port, patience).unwrap();
                each(ProcessGroup::join(&point, "test", (rank, size), "127.0.0.1", patience).unwrap());
            });
        }
    });
}

/// Every model, way of freezing and stage, on one rank and on two.
fn each_case(each: impl Fn(&str, &Model, &Sharding) + Sync) {
    for name in ["llama_tied_f32", "llama_biases"] {
        for (which, freezes) in [("every other MLP", every_other_mlp as Freezes), ("whole units", whole_units)] {
            for (size, stage) in [1, 2].into_iter().flat_map(|size| (0..4).map(move |stage| (size, stage))) {
                let what = format!("{name}, {which} frozen, stage {stage} on {size}");
                ranks(size, |group| {
                    let stage = ZeroStage::from_number(stage).unwrap();
                    each(&what, &Model::new(name, freezes), &Sharding { group, stage, offload: false });
                });
            }
        }
    }
}

/// Also where the state is set aside between two steps.
#[test]
fn the_trained_move_as_in_a_plain_loop_and_the_frozen_stay() {
    each_case(|what, model, sharding| {
        for recompute in [false, true] {
            let mut policy = model.policy(model.state(Kind::Double, sharding), recompute);
            let step = |step| {
                let norm = learn(&mut policy, step);
                if recompute {
                    policy.state.set_aside(true).unwrap();
                    policy.state.bring_back().unwrap();
                }
                norm
            };
            let norms: Vec<f64> = (0..STEPS).map(step).collect();
            model.assert_plain(what, &norms, &policy.state);
        }
    });
}

/// In lower precision, where gradients arrive on the leaves and passes take fused layers, the frozen stay too.
#[test]
fn lower_precision_freezes_too() {
    each_case(|what, model, sharding| {
        let (norms, _) = model.plain_loop();
        for kind in [Kind::Float, Kind::BFloat16] {
            let mut policy = model.policy(model.state(kind, sharding), false);
            let norm = learn(&mut policy, 0);
            assert!((norm / norms[0] - 1.0).abs() < 0.05, "{what}, {kind:?}: {norm}, in f64 {}", norms[0]);
            let found: HashMap<_, _> = policy.state.tensors().unwrap().into_iter().collect();
            for param in model.params() {
                let weight = &found[&format!("weights.{}", param.name)];
                let stays = *weight == model.weight(&param.name).to_kind(weight.kind());
                assert_eq!(stays, !param.trainable, "{what}, {kind:?}: {}", param.name);
                assert!(param.trainable || weight.kind() == kind, "{what}: the frozen have no other copy");
            }
        }
    });
}

/// A state that another one's file was restored into goes on as that one does.
#[test]
fn a_saved_state_is_taken_up_whole() {
    let folder = tempfile::tempdir().unwrap();
    each_case(|what, model, sharding| {
        let (group, file) = (&sharding.group, folder.path().join("state.safetensors"));
        let mut saved = model.policy(model.state(Kind::Double, sharding), false);
        learn(&mut saved, 0);
        let names = saved.state.names(&StatePart::ALL);
        let create = || TensorWriter::create(&file, &names, Kind::Double, &[]).unwrap();
        let mut writer = (group.rank() == 0).then(create);
        let write = &mut |name: &str, tensor: &Tensor| {
            writer.iter_mut().for_each(|writer| writer.write(name, tensor).unwrap());
            Ok(())
        };
        saved.state.visit(&StatePart::ALL, write).unwrap();
        writer.into_iter().for_each(|writer| writer.finish().unwrap());
        group.barrier("saved").unwrap();

        let blank = &mut |name: &str| Ok(model.weight(name).zeros_like());
        let place = (Kind::Double, Device::Cpu);
        let state = TrainingState::new(Role::Actor, &model.shape, ADAMW, place, sharding, blank).unwrap();
        let mut restored = model.policy(state, false);
        let tensors = TensorFile::open(&file).unwrap();
        restored.state.restore(1, &mut |name| Ok(tensors.tensor(name).unwrap())).unwrap();
        assert_eq!(restored.state.tensors().unwrap(), saved.state.tensors().unwrap(), "{what}");
        let norms = [&mut saved, &mut restored].map(|policy| learn(policy, 1));
        assert_eq!(norms[0], norms[1], "{what}");
        assert_eq!(restored.state.tensors().unwrap(), saved.state.tensors().unwrap(), "{what}, a step later");
        group.barrier("read").unwrap();
    });
}

/// Two states over one frozen base learn each as if alone; its memory is the first one's to count and to move.
#[test]
fn two_states_share_a_frozen_base() {
    each_case(|what, model, sharding| {
        let base = model.state(Kind::Double, sharding);
        let load = &mut |name: &str| {
            assert!(model.params().any(|p| p.name == name && p.trainable), "{name} is there");
            Ok(model.weight(name))
        };
        let second = TrainingState::with_base(&base, Role::Critic, &model.shape, ADAMW, sharding, load);
        if sharding.parameters() {
            let refusal = second.err().unwrap().to_string();
            assert!(refusal.contains("share frozen weights: they must be whole on every rank"), "{refusal}");
            return;
        }
        let second = second.unwrap();
        let (of_base, of_second) = (base.params(), second.params());
        for param in model.params() {
            let places = [&of_base, &of_second].map(|params| params[&param.name].weight.data_ptr());
            assert_eq!(places[0] == places[1], !param.trainable, "{what}: {}", param.name);
        }
        let frozen: i64 = model.params().filter(|param| !param.trainable).map(ParamShape::numel).sum();
        let saved = base.bytes() - second.bytes();
        assert!((8 * frozen..9 * frozen).contains(&(saved as i64)), "{what}: {saved} bytes for {frozen} parameters");

        let mut policies = [base, second].map(|state| model.policy(state, false));
        let norms: Vec<[f64; 2]> = (0..STEPS)
            .map(|step| {
                let norms = [0, 1].map(|index| learn(&mut policies[index], step));
                policies[1].state.set_aside(true).unwrap(); // the base stays
                let frozen = &model.params().find(|param| !param.trainable).unwrap().name;
                assert_eq!(of_base[frozen].weight, model.weight(frozen), "{what}");
                policies[1].state.bring_back().unwrap();
                norms
            })
            .collect();
        for (index, policy) in policies.iter().enumerate() {
            let norms: Vec<f64> = norms.iter().map(|norms| norms[index]).collect();
            model.assert_plain(&format!("{what}, state {index}"), &norms, &policy.state);
        }
    });
}

#[test]
fn a_base_of_another_shape_or_that_freezes_others_is_refused() {
    let model = Model::new("llama_biases", whole_units);
    let mut wider = Model::new("llama_biases", whole_units);
    wider.shape.units.iter_mut().flat_map(|unit| &mut unit.params).for_each(|param| param.shape[0] *= 2);
    for other in [Model::new("llama_biases", every_other_mlp), wider] {
        let base = other.state(Kind::Double, &Sharding::whole());
        let load = &mut |name: &str| Ok(model.weight(name));
        let refused =
            TrainingState::with_base(&base, Role::Critic, &model.shape, ADAMW, &Sharding::whole(), load).err().unwrap();
        assert_eq!(
            refused.to_string(),
            "critic and actor share frozen weights: they must freeze the same parameters of the same model"
        );
    }
}
