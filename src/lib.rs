//! The programs: what they read ([`recipe`]), how they are put together ([`wire`]), what they do ([`run`])
//! and what a person sees of it ([`echelon_monitor`]).

pub mod recipe;

pub mod wire;

pub mod run;

pub mod rank_plan;
pub mod run_spec;

pub mod forecast;
pub mod machine;
pub mod plan;
pub mod program;
pub mod programs;

pub mod assignment;
pub mod devices;
pub mod settings;
pub mod worker;
pub mod workers;

pub mod checkpoint;
pub mod gpu_check;
pub mod import;
pub mod inference;
pub mod json_lines;
pub mod model_folders;
pub mod node;
pub mod options;
pub mod prompts;
pub mod replay;
pub mod resume;
pub mod reward;
pub mod rules;
pub mod watch;
