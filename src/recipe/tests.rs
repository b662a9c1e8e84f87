//! Errors are snapshots under `tests/snapshots/recipe/` (a recipe and what it prints), every shipped recipe loads
//! and resolves, and the reference page is up to date. `ECHELON_BLESS=1` rewrites what is out of date.

use std::path::{Path, PathBuf};

use echelon_schema::{Key, collect_names};

use echelon_algorithms::kl::KlEstimator;
use echelon_core::optimizer::Decay;
use echelon_tasks::reward::RuleConfig;

use super::foreign::FOREIGN;
use super::*;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Compares with the file at `path` below the repository, or rewrites it when asked to.
fn expect_file(path: &Path, actual: &str) {
    let file = root().join(path);
    if std::env::var_os("ECHELON_BLESS").is_some() {
        return std::fs::write(&file, actual).unwrap();
    }
    let expected = std::fs::read_to_string(&file).unwrap_or_default();
    assert_eq!(actual, expected, "{} is out of date: ECHELON_BLESS=1 rewrites it", path.display());
}

fn files_in(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .map(|path| folder.join(path.file_name().unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn errors_read_as_their_snapshots() {
    let cases = files_in(Path::new("tests/snapshots/recipe"), "toml");
    assert!(cases.len() > 30, "the snapshot recipes are gone");
    for case in cases {
        let text = std::fs::read_to_string(root().join(&case)).unwrap();
        let header = text.lines().map_while(|line| line.strip_prefix("# "));
        let sets: Vec<String> =
            header.clone().filter_map(|line| line.strip_prefix("--set ")).map(str::to_owned).collect();
        let error = match header.into_iter().find_map(|line| line.strip_prefix("program: ")) {
            Some("sft") => SftRecipe::load(&case, &sets).err(),
            Some("reward") => RewardRecipe::load(&case, &sets).err(),
            _ => PpoRecipe::load(&case, &sets).err(),
        };
        let error = error.unwrap_or_else(|| panic!("{} loads, but should be refused", case.display()));
        let tests = root().join("tests").canonicalize().unwrap();
        let here = tests.parent().unwrap();
        let working_directory = std::env::current_dir().unwrap();
        let shown = error.to_string().replace(here.to_str().unwrap(), "$ROOT");
        let shown = shown.replace(working_directory.to_str().unwrap(), "$ROOT");
        expect_file(&case.with_extension("txt"), &format!("{shown}\n"));
    }
}

#[test]
fn a_recipe_that_is_not_there_is_named() {
    let error = PpoRecipe::load(Path::new("recipes/absent.toml"), &[]).unwrap_err();
    assert!(error.to_string().starts_with("cannot read the recipe `recipes/absent.toml`: "), "{error}");
}

#[test]
fn the_reference_page_is_up_to_date() {
    expect_file(Path::new("docs/recipe-reference.md"), &reference_page());
}

#[test]
fn every_key_has_a_sentence_and_every_number_a_range() {
    fn check(path: &str, keys: &[Key]) {
        for key in keys {
            let name = format!("{path}.{}", key.name);
            assert!(key.doc.trim().ends_with('.'), "{name} has no full sentence: {:?}", key.doc);
            let number = key.kind.starts_with("integer") || key.kind.starts_with("number");
            let free = ["weight", "missing_eos_penalty"].contains(&key.name);
            assert!(!number || free || !key.range.is_empty(), "{name} is a number without a range");
            check(&name, key.table.as_deref().unwrap_or_default());
        }
    }
    check("ppo", &PpoRecipe::default().describe());
    check("sft", &SftRecipe::default().describe());
    check("reward", &RewardRecipe::default().describe());
}

#[test]
fn foreign_names_lead_to_keys_that_exist() {
    let mut known = Vec::new();
    collect_names("", &PpoRecipe::default().describe(), &mut known);
    collect_names("", &SftRecipe::default().describe(), &mut known);
    collect_names("", &RewardRecipe::default().describe(), &mut known);
    for (framework, name, ours, _) in FOREIGN.keys {
        assert!(known.iter().any(|key| key == ours), "{framework}'s `{name}` leads to `{ours}`, which is no key");
    }
}

fn kind_of(path: &Path) -> &'static str {
    let stem = path.file_stem().unwrap().to_str().unwrap();
    let has = |word| stem.split('-').any(|part| part == word);
    if has("sft") {
        "sft"
    } else if has("reward") {
        "reward"
    } else {
        "ppo"
    }
}

#[test]
fn every_shipped_recipe_loads_and_resolves() {
    let recipes = files_in(Path::new("recipes"), "toml");
    assert!(recipes.len() >= 7, "the shipped recipes are gone");
    for path in recipes {
        let file = root().join(&path);
        let text = std::fs::read_to_string(root().join(&path)).unwrap();
        assert!(text.starts_with("# "), "the first line of {} says hardware, time and purpose", path.display());
        match kind_of(&path) {
            "sft" => drop(loaded(SftRecipe::load_for_plan(&file, &[]))),
            "reward" => drop(loaded(RewardRecipe::load_for_plan(&file, &[]))),
            _ => check_shipped(&path, loaded(PpoRecipe::load_for_plan(&file, &[]))),
        }
    }
}

fn loaded<T>(recipe: Result<T, RecipeError>) -> T {
    recipe.unwrap_or_else(|error| panic!("refused:\n{error}"))
}

/// The name is the file's, the devices are those of the name, and every shape that the recipe names is there.
fn check_shipped(path: &Path, recipe: PpoRecipe) {
    let stem = path.file_stem().unwrap().to_str().unwrap();
    assert_eq!(recipe.name, stem);
    let resolved = recipe.resolve();
    let last = stem.rsplit('-').next().unwrap();
    if let Some((nodes, gpus)) = last.strip_suffix('g').and_then(|last| last.split_once('n')) {
        let (nodes, gpus): (usize, usize) = (nodes.parse().unwrap(), gpus.parse().unwrap());
        assert_eq!(resolved.placement.devices.count(), Some(nodes * gpus), "{stem}");
        assert_eq!(resolved.placement.devices.nodes, nodes, "{stem}");
        let shapes = [resolved.actor.shape.as_ref(), resolved.critic.shape.as_ref()];
        for shape in shapes {
            let config = shape.unwrap_or_else(|| panic!("{stem}: no shape to plan with")).join("config.json");
            assert!(config.exists(), "{stem}: {} is missing", config.display());
        }
    }
    assert_round_trip(&resolved);
}

/// A folder of its own, removed at the end.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }
}

/// The resolved recipe, written and read again from another folder, resolves to the same value.
fn assert_round_trip(resolved: &ResolvedRecipe<PpoKeys>) {
    let folder = Folder::new();
    let path = folder.write("run/recipe.resolved.toml", &resolved.to_toml());
    let again = PpoRecipe::load_for_plan(&path, &[]).unwrap_or_else(|error| panic!("{error}\n{}", resolved.to_toml()));
    let again = again.resolve();
    assert_eq!(&again, resolved);
    assert_eq!(again.to_toml(), resolved.to_toml());
}

const SMALL: &str = r#"
[actor]
model = "owner/tiny"
[reward]
rule = "math"
[data]
prompts = "data/prompts.jsonl"
label_key = "answer"
[rollout]
batch_size = 64
samples_per_prompt = 4
[ppo]
mini_batch_size = 32
"#;

fn load_small(folder: &Folder, extra: &str, sets: &[&str]) -> PpoRecipe {
    let path = folder.write("small.toml", &format!("{SMALL}{extra}"));
    let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
    PpoRecipe::load_for_plan(&path, &sets).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn defaults_are_openrlhfs() {
    let recipe = PpoRecipe::default();
    assert_eq!((recipe.keys.epochs, recipe.keys.mini_batch_size, recipe.rollout.batch_size), (1, 128, 1024));
    assert_eq!((recipe.keys.gamma, recipe.keys.gae_lambda, recipe.keys.kl_coef), (1.0, 1.0, 0.01));
    assert_eq!((recipe.keys.policy_clip, recipe.keys.value_clip, recipe.keys.dual_clip), (0.2, Some(0.5), None));
    assert_eq!((recipe.keys.kl_estimator, recipe.keys.kl_horizon), (KlEstimator::K1, 10000.0));
    assert_eq!((recipe.actor.optimizer.lr, recipe.critic.optimizer.lr), (1e-6, 9e-6));
    assert_eq!(recipe.critic.optimizer.betas, [0.9, 0.95]);
    let adam = &recipe.actor.optimizer;
    assert_eq!((adam.schedule, adam.warmup_ratio, adam.min_lr_ratio), (Decay::Cosine, 0.03, 0.1));
    assert_eq!((recipe.reward.clip_range, recipe.train.compute.max_grad_norm), (Some([-10.0, 10.0]), Some(1.0)));
}

#[test]
fn the_name_is_the_files_unless_given() {
    let folder = Folder::new();
    assert_eq!(load_small(&folder, "", &[]).name, "small");
    assert_eq!(load_small(&folder, "", &["name=other"]).name, "other");
}

#[test]
fn set_values_are_toml_else_strings() {
    let folder = Folder::new();
    let sets = [
        "ppo.kl_coef=0",
        "actor.model=acme/model-1",
        "rollout.stop=[\"\\n\", \"=\"]",
        "train.steps = 7",
        "ppo.value_clip=off",
    ];
    let recipe = load_small(&folder, "", &sets);
    assert_eq!(recipe.keys.kl_coef, 0.0);
    assert_eq!(recipe.actor.model, ModelSource::Hub("acme/model-1".into()));
    assert_eq!(recipe.rollout.stop, ["\n", "="]);
    assert_eq!((recipe.train.steps, recipe.keys.value_clip), (7, None));
}

#[test]
fn the_last_set_wins_and_reaches_into_lists() {
    let folder = Folder::new();
    let mix = "[[data.mix]]\nprompts = \"a.jsonl\"\n[[data.mix]]\nprompts = \"b.jsonl\"\n";
    let path = folder.write(
        "mix.toml",
        &SMALL.replace("prompts = \"data/prompts.jsonl\"\n", "").replace("[rollout]", &format!("{mix}[rollout]")),
    );
    let sets = ["data.mix.1.weight=3", "train.steps=1", "train.steps=2"].map(str::to_owned);
    let recipe = PpoRecipe::load_for_plan(&path, &sets).unwrap();
    assert_eq!(recipe.data.mix.iter().map(|source| source.weight).collect::<Vec<_>>(), [1.0, 3.0]);
    assert_eq!(recipe.train.steps, 2);
    assert_round_trip(&recipe.resolve());
}

#[test]
fn paths_start_at_the_recipe_or_at_the_working_directory() {
    let folder = Folder::new();
    let base = folder.path().canonicalize().unwrap();
    let recipe = load_small(&folder, "", &[]);
    assert_eq!(recipe.data.prompts, Some(base.join("data/prompts.jsonl")));
    let recipe = load_small(&folder, "", &["data.prompts=x/../data/prompts.jsonl"]);
    assert_eq!(recipe.data.prompts, Some(std::env::current_dir().unwrap().join("data/prompts.jsonl")));
}

#[test]
fn a_folder_comes_before_a_hub_id() {
    let folder = Folder::new();
    folder.write("owner/tiny/config.json", "{}");
    let recipe = load_small(&folder, "", &[]);
    assert_eq!(recipe.actor.model, ModelSource::Folder(folder.path().canonicalize().unwrap().join("owner/tiny")));
}

#[test]
fn the_critic_starts_from_the_reward_model_else_from_the_actor() {
    let folder = Folder::new();
    let hub = |id: &str| ModelSource::Hub(id.into());
    assert_eq!(load_small(&folder, "", &[]).resolve().critic.model, Some(hub("owner/tiny")));
    let by_model = load_small(&folder, "", &["reward={model = \"owner/judge\"}"]).resolve();
    assert_eq!(by_model.critic.model, Some(hub("owner/judge")));
    assert_round_trip(&by_model);
    let by_hand = load_small(&folder, "", &["reward={model = \"owner/judge\"}", "critic.model=owner/own"]).resolve();
    assert_eq!(by_hand.critic.model, Some(hub("owner/own")));
}

#[test]
fn the_reference_is_the_actor_and_absent_without_kl() {
    let folder = Folder::new();
    let resolved = load_small(&folder, "", &[]).resolve();
    assert_eq!(resolved.reference.model, Some(ModelSource::Hub("owner/tiny".into())));
    let resolved = load_small(&folder, "", &["ppo.kl_coef=0"]).resolve();
    assert_eq!((&resolved.reference.model, &resolved.reference.shape), (&None, &None));
    assert_round_trip(&resolved);
}

#[test]
fn every_kind_of_reward_survives_the_resolved_recipe() {
    let folder = Folder::new();
    let mix = [
        "rule = \"math\"\ntolerance = 0.01",
        "rule = \"regex\"\npattern = '^\\d+ \"x\"$'",
        "rule = \"length\"\ntarget_tokens = 20\nweight = -0.5",
        "rule = \"length\"\nmin_tokens = 3",
        "rule = \"format\"",
        "rule = \"sentiment\"\nlexicon = \"words.txt\"",
        "url = \"https://example.com/score\"\ntimeout_s = 5\nretries = 0",
        "command = \"python3 score.py\"",
        "model = \"owner/judge\"",
    ];
    let mix: String = mix.iter().map(|part| format!("[[reward.mix]]\n{part}\n")).collect();
    let path = folder.write("rewards.toml", &SMALL.replace("[reward]\nrule = \"math\"\n", &mix));
    let resolved = PpoRecipe::load_for_plan(&path, &[]).unwrap_or_else(|error| panic!("{error}")).resolve();
    let sources = resolved.reward.sources();
    let rules = [0, 2].map(|index: usize| sources[index].0.rule().unwrap());
    assert_eq!(rules, [RuleConfig::Math { tolerance: 0.01 }, RuleConfig::Length { min: 20, max: Some(20) }]);
    assert_eq!((sources[2].1, sources.len()), (-0.5, 9));
    let (command, base) = (sources[7].0, folder.path().canonicalize().unwrap());
    assert_eq!((command.command.as_deref(), &command.command_dir), (Some("python3 score.py"), &Some(base)));
    assert_eq!((command.num_cpus, command.timeout_s), (1.0, 180.0));
    assert_round_trip(&resolved);
}

#[test]
fn recipes_of_sft_and_reward_survive_being_written() {
    let folder = Folder::new();
    let sft = "[model]\nmodel = \"m\"\ninit = \"random\"\n[data]\ntrain = \"a.jsonl\"\neval_fraction = 0.1\n[train]\nsteps = 9\n";
    let first = SftRecipe::load_for_plan(&folder.write("tiny-sft.toml", sft), &[]).unwrap();
    let again = SftRecipe::load_for_plan(&folder.write("run/recipe.resolved.toml", &to_toml(&first)), &[]).unwrap();
    assert_eq!((again.name.as_str(), again.train.optimizer_steps(1000)), ("tiny-sft", 9));
    assert_eq!(again, first);
    let pairs = "[model]\nmodel = \"owner/tiny\"\n[[data.mix]]\ntrain = \"a.jsonl\"\n[[data.mix]]\ntrain = \"b.jsonl\"\nweight = 2\n";
    let first = RewardRecipe::load_for_plan(&folder.write("tiny-reward.toml", pairs), &[]).unwrap();
    let again = RewardRecipe::load_for_plan(&folder.write("run/recipe.resolved.toml", &to_toml(&first)), &[]).unwrap();
    assert_eq!((again.data.mix[1].weight, again.model.optimizer.lr), (2.0, 9e-6));
    assert_eq!((again.train.optimizer_steps(1000), &again), (8, &first));
}

#[test]
fn the_batch_arithmetic_is_designs() {
    let folder = Folder::new();
    let recipe = load_small(&folder, "[train]\nsteps = 10\n", &["placement.workers=8", "ppo.epochs=2"]);
    let batch = recipe.resolve().batch;
    assert_eq!((batch.optimizer_steps, batch.critic_optimizer_steps, batch.actor_warmup_steps), (16, Some(160), 5));
    let text = batch.to_string();
    assert!(
        text.starts_with("64 prompts x 4 samples = 256 responses -> 8 optimizer steps of 32, 2 epochs: 16\n"),
        "{text}"
    );
    assert_eq!(batch.training_share(8), "32 responses, 4 of each mini-batch in at most 1 micro-batch");
    assert_eq!((batch.share(3), batch.share(4)), ("85 to 86 responses".to_string(), "64 responses".to_string()));
}

#[test]
fn unlike_nodes_are_declared_as_pools() {
    let folder = Folder::new();
    let pools = "[[placement.node_pool]]\nnodes = 2\ngpus_per_node = 8\ngpu = \"H100\"\n\
                 [[placement.node_pool]]\ngpus_per_node = 4\ngpu = \"L40S\"\nhost_memory_gib = 512\n";
    let recipe = load_small(&folder, pools, &[]);
    let devices = &recipe.placement.devices;
    assert_eq!((devices.count(), devices.num_nodes()), (Some(20), 3));
    assert_round_trip(&recipe.resolve());
    let path = folder.write("pools.toml", &format!("{SMALL}{pools}"));
    for (set, named) in [
        ("placement.workers=4", "`placement.workers` beside [[placement.node_pool]]"),
        ("placement.nodes=2", "`placement.nodes` beside"),
        ("placement.gpu=H200", "`placement.gpu` beside"),
        ("placement.device=cpu", "`placement.device` is \"cpu\""),
    ] {
        let error = PpoRecipe::load_for_plan(&path, &[set.to_string()]).unwrap_err().to_string();
        assert!(error.contains(named), "{set}: {error}");
    }
    let path = folder.write("pools.toml", &format!("{SMALL}{}", pools.replace("L40S", "A100")));
    let error = PpoRecipe::load_for_plan(&path, &[]).unwrap_err().to_string();
    assert!(error.contains("`A100` may be A100-80GB, A100-40GB") && error.contains("gpu = \"A100\""), "{error}");
}

#[test]
fn workers_are_an_equal_share_of_the_nodes() {
    let folder = Folder::new();
    let path = folder.write("small.toml", SMALL);
    let sets = ["placement.workers=3", "placement.nodes=2"].map(String::from);
    let error = PpoRecipe::load_for_plan(&path, &sets).unwrap_err().to_string();
    assert!(error.contains("3 workers are no equal share of 2 nodes") && error.contains("`workers = 4`"), "{error}");
}

#[test]
fn micro_batches_are_counted_for_full_length_sequences() {
    let folder = Folder::new();
    let sets = ["data.max_prompt_tokens=32", "rollout.max_new_tokens=48", "train.tokens_per_micro_batch=400"];
    let batch = load_small(&folder, "", &sets).resolve().batch;
    assert_eq!(batch.micro_batches_at_most(1), 7, "32 rows, 5 of 80 tokens fit in 400");
    assert_eq!(batch.micro_batches_at_most(4), 2);
    let tiny = load_small(&folder, "", &["train.tokens_per_micro_batch=10"]).resolve().batch;
    assert_eq!(tiny.micro_batches_at_most(1), 32, "a longer sequence goes alone");
}

#[test]
fn later_errors_point_at_their_key() {
    let folder = Folder::new();
    let recipe = load_small(&folder, "", &["rollout.max_new_tokens=9000"]);
    let error =
        recipe.origins.error_at("data.prompts", "`data.prompts` is empty", "it needs at least one row").to_string();
    assert!(error.contains("small.toml:7:1: `data.prompts` is empty\n"), "{error}");
    let error = recipe.origins.error_at("rollout.max_new_tokens", "too long", "").to_string();
    assert!(error.starts_with("--set rollout.max_new_tokens=9000: too long\n"), "{error}");
}

#[test]
fn only_the_keys_that_decide_what_is_learned_must_stay_in_a_resumed_run() {
    let folder = Folder::new();
    let stored = folder.write(RESOLVED_FILE, &load_small(&folder, "", &[]).resolve().to_toml());
    let changes = |sets: &[&str]| -> Vec<String> {
        let present = load_small(&folder, "", sets).resolve().to_toml();
        changes_since::<PpoRecipe>(&stored, &present).unwrap().iter().map(ToString::to_string).collect()
    };
    let free = [
        "name=other",
        "train.steps=7",
        "checkpoint.every_steps=off",
        "eval.temperature=0.1",
        "train.tokens_per_micro_batch=8",
        "train.zero_stage=3",
        "generation.max_sequences=3",
        "placement.device=cpu",
        "placement.actor={devices=[0]}",
        "actor.shape=shapes/tiny",
    ];
    assert!(changes(&free).is_empty(), "{:?}", changes(&free));
    assert_eq!(
        changes(&["seed=1", "ppo.kl_coef=0.5", "rollout.top_k=5", "train.dtype=float64", "train.max_grad_norm=8.0"]),
        [
            "ppo.kl_coef: 0.01 before, 0.5 now",
            "rollout.top_k: unset before, 5 now",
            "seed: 42 before, 1 now",
            "train.dtype: \"auto\" before, \"float64\" now",
            "train.max_grad_norm: 1.0 before, 8.0 now",
        ]
    );
    let mixed = changes(&["reward={mix=[{rule=\"math\", weight=0.5}]}"]);
    assert!(mixed.contains(&"reward.mix.0.weight: unset before, 0.5 now".to_owned()), "{mixed:?}");
    let foreign = changes_since::<SftRecipe>(&stored, "").unwrap_err().to_string();
    assert!(foreign.contains("a recipe of `sft` has [model], this one has [actor]"), "{foreign}");
}
