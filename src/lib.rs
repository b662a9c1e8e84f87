//! The programs: what they read ([`recipe`]), how they are put together ([`wire`]), what they do ([`run`])
//! and what a person sees of it ([`monitor`]).

pub mod recipe;

pub mod wire;

pub mod run;

pub mod run_spec;

pub mod calibration;
pub mod forecast;
pub mod layout;
pub mod machine;
pub mod matmul_rate;
pub mod plan;
pub mod program;
pub mod programs;

pub mod assignment;
pub mod crew;
pub mod deferred;
pub mod generator;
pub mod seat;
pub mod trained;
pub mod worker;

pub mod checkpoint;
pub mod gpu_check;
pub mod host;
pub mod host_plan;
pub mod import;
pub mod inference;
pub mod json_lines;
pub mod models;
pub mod monitor;
pub mod node;
pub mod options;
pub mod prompts;
pub mod replay;
pub mod resume;
pub mod reward;
pub mod rules;
pub mod watch;
