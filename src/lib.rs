//! The programs: what they read ([`recipe`]), how they are put together ([`wire`]), what they do ([`run`],
//! [`supervised`]) and what a person sees of it ([`monitor`]).

pub mod recipe;

pub mod wire;

pub mod run;

pub mod supervised;

pub mod calibration;
pub mod forecast;
pub mod plan;
pub mod program;
pub mod ranks;

pub mod checkpoint;
pub mod host;
pub mod inference;
pub mod json_lines;
pub mod models;
pub mod monitor;
pub mod options;
pub mod prompts;
pub mod resume;
pub mod reward;
pub mod watch;
