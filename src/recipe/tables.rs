//! The tables of a PPO recipe. A field's doc comment, default and range are all there is to know about a key:
//! the reference page, the error messages and `recipe.resolved.toml` are made from them.
//!
//! Defaults are OpenRLHF's.

use std::net::SocketAddr;
use std::path::PathBuf;

use echelon_schema::{Auto, MOST, ModelSource, NewPath, above, above_to, at_least, between, choice, from_below, table};

use super::Origins;

table! {
    /// A PPO run.
    pub struct Recipe {
        inline origins: Origins;
        /// Names the run folder `runs/<name>/`. Default: the recipe's file name.
        pub name: String = String::new();
        /// Every random number of the run follows from it: data order, sampling, fresh weights.
        pub seed: u64 = 42, in at_least(0.0);
        /// The policy that is trained.
        pub actor: Actor = Actor::default();
        /// The value model that is trained beside it.
        pub critic: Critic = Critic::default();
        /// The frozen policy that the KL penalty is measured against; not loaded at all when `ppo.kl_coef = 0`.
        pub reference: Reference = Reference::default();
        /// Where scores come from: one source in this table, or several `[[reward.mix]]` tables.
        pub reward: Reward = Reward::default();
        /// The prompts: one source in this table, or several `[[data.mix]]` tables.
        pub data: Data = Data::default();
        /// What one step samples.
        pub rollout: Rollout = Rollout::default();
        /// How a step learns from its rollout.
        pub ppo: Ppo = Ppo::default();
        /// Length of the run, numbers and memory.
        pub train: Train = Train::default();
        /// The engine that samples.
        pub generation: Generation = Generation::default();
        /// Which devices do what.
        pub placement: Placement = Placement::default();
        /// What is saved to resume from.
        pub checkpoint: Checkpoint = Checkpoint::default();
        /// Held-out prompts, scored before the first step, during the run and after the last.
        pub eval: Eval = Eval::default();
    }
}

table! {
    /// The policy that is trained.
    pub struct Actor {
        /// Hugging Face folder, or hub id `owner/name`.
        pub model: ModelSource;
        /// Folder with the model's `config.json`, enough for `--plan` where the weights are not at hand.
        pub shape: Option<PathBuf> = None;
        /// AdamW of the actor.
        pub optimizer: Optimizer = Optimizer::default();
    }
}

table! {
    /// The value model that is trained beside the actor.
    pub struct Critic {
        /// Where it starts. Default: the reward model if there is one, else the actor's backbone with a fresh value head.
        pub model: Option<ModelSource> = None;
        /// Folder with its `config.json`, for `--plan`.
        pub shape: Option<PathBuf> = None;
        /// AdamW of the critic.
        pub optimizer: Optimizer = Optimizer { lr: 9e-6, ..Optimizer::default() };
    }
}

table! {
    /// AdamW and its learning-rate schedule.
    pub struct Optimizer {
        /// Peak learning rate.
        pub lr: f64 = 1e-6, in between(0.0, 1.0);
        /// Decay rates of the two moments.
        pub betas: [f64; 2] = [0.9, 0.95], in from_below(0.0, 1.0);
        /// Added to the root of the second moment.
        pub eps: f64 = 1e-8, in above_to(0.0, 1.0);
        /// Decoupled weight decay.
        pub weight_decay: f64 = 0.0, in between(0.0, 1.0);
        /// Shape of the learning rate after warm-up.
        pub schedule: Schedule = Schedule::Cosine;
        /// Part of all optimizer steps over which the learning rate rises linearly from 0; rounded up to whole steps.
        pub warmup_ratio: f64 = 0.03, in between(0.0, 1.0);
        /// Where `cosine` ends, as a part of `lr`.
        pub min_lr_ratio: f64 = 0.1, in between(0.0, 1.0);
    }
}

choice! {
    /// Shape of the learning rate after warm-up.
    pub enum Schedule {
        /// Stays at `lr`.
        Constant = "constant",
        /// Falls in a straight line to 0.
        Linear = "linear",
        /// Falls along half a cosine to `min_lr_ratio * lr`.
        Cosine = "cosine",
    }
}

table! {
    /// The frozen policy that the KL penalty is measured against.
    pub struct Reference {
        /// Default: the weights that the actor starts from.
        pub model: Option<ModelSource> = None;
        /// Folder with its `config.json`, for `--plan`.
        pub shape: Option<PathBuf> = None;
        /// Keep its weights in host memory and bring them to the device only for its turn.
        pub offload: bool = false;
    }
}

table! {
    /// One way to score a response: exactly one of `model`, `rule`, `url` and `command`.
    pub struct RewardSource {
        /// A sequence-classification checkpoint: Hugging Face folder or hub id. One with another tokenizer than the actor's gets the decoded text.
        pub model: Option<ModelSource> = None;
        /// Folder with the model's `config.json`, for `--plan`.
        pub shape: Option<PathBuf> = None;
        /// A built-in rule.
        pub rule: Option<RuleName> = None;
        /// For `rule = "math"`: largest difference that passes, as a part of the label's size; 0 compares exact fractions.
        pub tolerance: Option<f64> = None, in between(0.0, 1.0);
        /// For `rule = "regex"`: the regular expression, in the syntax of Rust's regex crate.
        pub pattern: Option<String> = None;
        /// For `rule = "format"`: the form of a whole response, where `…` or `...` stands for any text. Default: `<think>…</think><answer>…</answer>`.
        pub structure: Option<String> = None;
        /// For `rule = "length"`: the length in tokens that scores best.
        pub target_tokens: Option<usize> = None, in at_least(1.0);
        /// For `rule = "length"`: shorter responses score less.
        pub min_tokens: Option<usize> = None, in at_least(0.0);
        /// For `rule = "length"`: longer responses score less.
        pub max_tokens: Option<usize> = None, in at_least(1.0);
        /// For `rule = "sentiment"`: file with one `word<TAB>valence` per line, as VADER's lexicon.
        pub lexicon: Option<PathBuf> = None;
        /// A reward server: it gets POST `{"query", "prompts", "labels"}` and answers `{"rewards"}`, as OpenRLHF's do.
        pub url: Option<String> = None;
        /// A program, run by `sh -c`: it gets one JSON object per response on stdin and answers one per line.
        pub command: Option<String> = None;
        /// Working directory of `command`. Default: the recipe's folder.
        pub command_dir: Option<PathBuf> = None;
        /// For `command`: CPUs that it keeps busy while it scores; other tasks do not get them.
        pub num_cpus: f64 = 1.0, in between(0.0, 1024.0);
        /// For `url` and `command`: seconds that one request may take.
        pub timeout_s: f64 = 180.0, in above(0.0);
        /// For `url`: how often a failed request is tried again, after the first attempt.
        pub retries: usize = 5, in between(0.0, 100.0);
    }
}

choice! {
    /// A built-in scoring rule.
    pub enum RuleName {
        /// 1 when the response's number equals the label's: after `####`, in `\boxed{}`, else the last one.
        Math = "math",
        /// 1 when `pattern` is found in the response.
        Regex = "regex",
        /// 1 at `target_tokens`, or between `min_tokens` and `max_tokens`; falls to 0 at no token and at twice the most.
        Length = "length",
        /// 1 when the whole response has the form of `structure`.
        Format = "format",
        /// -1 to 1: how positive the words are, by `lexicon`.
        Sentiment = "sentiment",
    }
}

table! {
    /// Where scores come from.
    pub struct Reward {
        inline source: RewardSource;
        /// Scores are clipped to this range.
        pub clip_range: Option<[f64; 2]> = Some([-10.0, 10.0]);
        /// Subtract the reward model's stored mean from its scores and divide by its stored standard deviation. In a mix this
        /// comes before the weights, and the other sources keep their scores.
        pub normalize: bool = false;
        /// Subtracted from the score of a response that reached `max_new_tokens` without ending.
        pub missing_eos_penalty: Option<f64> = None;
        /// Several sources, added up by weight.
        pub mix: Vec<RewardMix> = Vec::new();
    }
}

table! {
    /// Each has one source, with the keys of `[reward]`, and its weight.
    pub struct RewardMix {
        inline source: RewardSource;
        /// Factor of this source's score; negative to punish.
        pub weight: f64 = 1.0;
    }
}

table! {
    /// The prompts.
    pub struct Data {
        /// File or folder of jsonl, json or parquet.
        pub prompts: Option<PathBuf> = None;
        /// Key of a row's prompt: a string, or a list of chat messages.
        pub prompt_key: String = String::from("prompt");
        /// Key of a row's label, handed to the reward.
        pub label_key: Option<String> = None;
        /// Wrap each prompt in the actor's chat template.
        pub apply_chat_template: bool = false;
        /// System message put before each prompt; needs `apply_chat_template`.
        pub system_prompt: Option<String> = None;
        /// Prompts with more tokens are left out, and counted.
        pub max_prompt_tokens: usize = 1024, in between(1.0, MOST);
        /// Use the first so many rows of all sources.
        pub max_samples: Option<usize> = None, in at_least(1.0);
        /// Several sources, drawn from by weight.
        pub mix: Vec<DataMix> = Vec::new();
    }
}

table! {
    /// Each names one source.
    pub struct DataMix {
        /// File or folder of jsonl, json or parquet.
        pub prompts: PathBuf;
        /// Share of this source among all, relative to the other weights.
        pub weight: f64 = 1.0, in above(0.0);
        /// Default: that of `[data]`.
        pub prompt_key: Option<String> = None;
        /// Default: that of `[data]`.
        pub label_key: Option<String> = None;
    }
}

table! {
    /// What one step samples.
    pub struct Rollout {
        /// Prompts per step.
        pub batch_size: usize = 1024, in between(1.0, MOST);
        /// Responses sampled for each prompt.
        pub samples_per_prompt: usize = 1, in between(1.0, MOST);
        /// A response ends after so many tokens.
        pub max_new_tokens: usize = 1024, in between(1.0, MOST);
        /// Logits are divided by it, for sampling and for log-probabilities.
        pub temperature: f64 = 1.0, in above_to(0.0, 100.0);
        /// Sample among the likeliest tokens whose probabilities sum to this.
        pub top_p: f64 = 1.0, in above_to(0.0, 1.0);
        /// Sample among this many likeliest tokens.
        pub top_k: Option<usize> = None, in at_least(1.0);
        /// Leave out tokens less likely than this part of the likeliest one's probability.
        pub min_p: f64 = 0.0, in between(0.0, 1.0);
        /// Strings that end a response, beside the model's own end tokens.
        pub stop: Vec<String> = Vec::new();
        /// Keep every step's rollout in this folder, for `replay`.
        pub record: Option<NewPath> = None;
        /// Take the rollouts from this folder instead of sampling: what is learned from equal rollouts can be compared.
        pub replay: Option<PathBuf> = None;
    }
}

table! {
    /// How a step learns from its rollout.
    pub struct Ppo {
        /// Passes over each rollout.
        pub epochs: usize = 1, in between(1.0, MOST);
        /// Responses per optimizer step; divides the step's responses.
        pub mini_batch_size: usize = 128, in between(1.0, MOST);
        /// The probability ratio counts up to 1 - this and 1 + this.
        pub policy_clip: f64 = 0.2, in above_to(0.0, 1.0);
        /// Upper side of the clip, when it differs from `policy_clip`.
        pub policy_clip_high: Option<f64> = None, in above(0.0);
        /// Bounds the loss of negative advantages at this factor.
        pub dual_clip: Option<f64> = None, in above(1.0);
        /// Values may move this far from those of the rollout.
        pub value_clip: Option<f64> = Some(0.5), in above(0.0);
        /// Discount per token.
        pub gamma: f64 = 1.0, in between(0.0, 1.0);
        /// Weight of longer returns in the advantage estimate.
        pub gae_lambda: f64 = 1.0, in between(0.0, 1.0);
        /// Weight of the KL penalty; at 0 the reference model is not loaded.
        pub kl_coef: f64 = 0.01, in at_least(0.0);
        /// Estimator of the KL divergence per token.
        pub kl_estimator: KlEstimator = KlEstimator::K1;
        /// Where the penalty enters.
        pub kl_placement: KlPlacement = KlPlacement::Reward;
        /// Adapt `kl_coef` so that the KL stays near this value.
        pub kl_target: Option<f64> = None, in above(0.0);
        /// Responses over which the adaptive `kl_coef` reacts.
        pub kl_horizon: f64 = 10000.0, in above(0.0);
        /// Weight of the entropy bonus.
        pub entropy_coef: f64 = 0.0, in at_least(0.0);
        /// First steps in which only the critic learns.
        pub critic_warmup_steps: usize = 0, in at_least(0.0);
    }
}

choice! {
    /// Estimator of the KL divergence per token, with r = log pi - log pi_ref.
    pub enum KlEstimator {
        /// r: unbiased, right for a penalty inside the reward.
        K1 = "k1",
        /// r^2 / 2.
        K2 = "k2",
        /// exp(-r) - 1 + r: never negative, right for a penalty inside the loss.
        K3 = "k3",
    }
}

choice! {
    /// Where the KL penalty enters.
    pub enum KlPlacement {
        /// Subtracted from each token's reward.
        Reward = "reward",
        /// Added to the policy loss.
        Loss = "loss",
    }
}

table! {
    /// Length of the run, numbers and memory.
    pub struct Train {
        /// Steps of the run: each is one rollout and its optimizer steps.
        pub steps: usize = 100, in at_least(1.0);
        /// Measure this machine after the first step, for some ten seconds, and say beside every step what the planner expects
        /// of it: `perf/planned_*`.
        pub calibrate: bool = false;
        inline_last compute: Compute;
    }
}

table! {
    /// Numbers and memory of training. None of these keys but `dtype` and `max_grad_norm` changes a result.
    pub struct Compute {
        /// Tokens per forward and backward pass on one device; a longer sequence goes alone.
        pub tokens_per_micro_batch: usize = 16192, in between(1.0, MOST);
        /// Type that models compute in; `auto` is bfloat16 on CUDA, else float32.
        pub dtype: Dtype = Dtype::Auto;
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
    pub enum Dtype {
        /// bfloat16 on CUDA, else float32.
        Auto = "auto",
        /// 32 bits.
        Float32 = "float32",
        /// 16 bits, with float32 master weights.
        Bfloat16 = "bfloat16",
        /// 64 bits, for checking numbers.
        Float64 = "float64",
    }
}

table! {
    /// The engine that samples.
    pub struct Generation {
        /// Which engine.
        pub engine: Engine = Engine::Embedded;
        /// Devices that share one copy of the engine's weights.
        pub tensor_parallel_size: usize = 1, in between(1.0, MOST);
        /// Sequences decoded at once.
        pub max_sequences: usize = 64, in between(1.0, MOST);
        /// Tokens of one engine pass.
        pub max_batched_tokens: usize = 8192, in between(1.0, MOST);
        /// Memory of the key-value cache; `auto` is what `max_sequences` of full length need.
        pub kv_cache_bytes: Auto<usize> = Auto::Auto, in at_least(1.0);
    }
}

choice! {
    /// Which engine samples.
    pub enum Engine {
        /// The built-in engine, on the trainer's own weights.
        Embedded = "embedded",
    }
}

table! {
    /// Which devices there are.
    pub struct Devices {
        /// Kind of device; `auto` is CUDA where it works.
        pub device: Device = Device::Auto;
        /// How roles share devices; `auto` goes by the actor's size.
        pub tier: Tier = Tier::Auto;
        /// Machines.
        pub nodes: usize = 1, in between(1.0, 100_000.0);
        /// GPUs of each machine; `auto` counts them.
        pub gpus_per_node: Auto<usize> = Auto::Auto, in between(1.0, 1024.0);
        /// Kind of GPU that `--plan` plans for: H200, H100-80GB, A100-80GB ...; unset, this machine's, else H100-80GB.
        pub gpu: Option<String> = None;
        /// Host memory of each machine that plans count on; `auto` is this machine's where it works itself, else 2 TB.
        pub host_memory_gib: Auto<f64> = Auto::Auto, in above(0.0);
        /// Devices in use; on CPU the number of worker processes.
        pub workers: Auto<usize> = Auto::Auto, in between(1.0, 1_000_000.0);
        /// Address at which workers that others start join, such as 0.0.0.0:7401; without it they are started on this
        /// machine.
        pub listen: Option<SocketAddr> = None;
        /// File in which the driver writes, for this user alone, what such workers authenticate with, and which it removes
        /// at the end. Default: one in the folder for temporary files.
        pub credentials: Option<NewPath> = None;
        /// Seconds that workers have to join.
        pub join_timeout_s: f64 = 120.0, in above_to(0.0, 604_800.0);
        /// Unlike machines, instead of `nodes`, `gpus_per_node` and `gpu`: devices are counted through the pools in order.
        pub node_pool: Vec<NodePool> = Vec::new();
    }
}

table! {
    /// Machines of one kind.
    pub struct NodePool {
        /// Machines of the pool.
        pub nodes: usize = 1, in between(1.0, 100_000.0);
        /// GPUs of each.
        pub gpus_per_node: usize, in between(1.0, 1024.0);
        /// Their kind, as in `placement.gpu`.
        pub gpu: String;
        /// Host memory of each; `auto` is 2 TB.
        pub host_memory_gib: Auto<f64> = Auto::Auto, in above(0.0);
    }
}

choice! {
    /// Kind of device.
    pub enum Device {
        /// CUDA where it works, else the CPU.
        Auto = "auto",
        /// The CPU.
        Cpu = "cpu",
        /// NVIDIA GPUs.
        Cuda = "cuda",
    }
}

choice! {
    /// How roles share devices.
    pub enum Tier {
        /// By the actor's parameters: small below 13e9, medium up to 34e9, large above.
        Auto = "auto",
        /// All roles on the same devices.
        Small = "small",
        /// Each role on its own devices; the generator on the actor's.
        Medium = "medium",
        /// As medium, the generator tensor-parallel.
        Large = "large",
    }
}

table! {
    /// Which devices do what.
    pub struct Placement {
        inline devices: Devices;
        /// The actor, by hand.
        pub actor: RolePlacement = RolePlacement::default();
        /// The critic, by hand.
        pub critic: RolePlacement = RolePlacement::default();
        /// The reward model, by hand.
        pub reward: RolePlacement = RolePlacement::default();
        /// The reference, by hand.
        pub reference: RolePlacement = RolePlacement::default();
        /// The generator, by hand.
        pub generator: RolePlacement = RolePlacement::default();
    }
}

table! {
    /// Devices of one role; without either key the planner decides.
    pub struct RolePlacement {
        /// Device numbers, counted through all machines from 0.
        pub devices: Option<Vec<usize>> = None, in at_least(0.0);
        /// Take turns with this role on its devices.
        pub colocate_with: Option<Role> = None;
    }
}

choice! {
    /// A role.
    pub enum Role {
        /// The policy being trained.
        Actor = "actor",
        /// The value model.
        Critic = "critic",
        /// The reward model.
        Reward = "reward",
        /// The frozen policy.
        Reference = "reference",
        /// The sampling engine.
        Generator = "generator",
    }
}

table! {
    /// What is saved to resume from.
    pub struct Checkpoint {
        /// Save every so many steps. A stopped run saves too.
        pub every_steps: Option<usize> = Some(50), in at_least(1.0);
        /// Newest checkpoints kept.
        pub keep: usize = 3, in at_least(1.0);
        /// Also keep the checkpoint in which this eval metric was best: highest, or lowest for a loss and a perplexity.
        pub best_metric: Option<String> = None;
    }
}

table! {
    /// Held-out prompts.
    pub struct Eval {
        /// File or folder, with the keys of `[data]`. Default: no evaluation.
        pub prompts: Option<PathBuf> = None;
        /// Evaluate every so many steps, beside before and after the run.
        pub every_steps: Option<usize> = None, in at_least(1.0);
        /// Responses sampled for each prompt.
        pub samples_per_prompt: usize = 4, in between(1.0, MOST);
        /// Sampling temperature; 0 takes the likeliest token.
        pub temperature: f64 = 0.6, in between(0.0, 100.0);
        /// Use the first so many prompts.
        pub max_samples: Option<usize> = None, in at_least(1.0);
    }
}
