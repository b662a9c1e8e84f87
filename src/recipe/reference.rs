//! Writes the recipe reference: every key of the three kinds of recipe, from the field docs.

use echelon_schema::{Table, program};

use super::{Root, for_each_recipe};

/// The whole page `docs/recipe-reference.md`.
pub fn reference_page() -> String {
    let mut page = String::from(INTRODUCTION);
    macro_rules! programs {
        ($($Recipe:ty),* $(,)?) => {
            $(program(&mut page, <$Recipe>::PROGRAM, <$Recipe>::DOC, &<$Recipe>::default().describe());)*
        };
    }
    for_each_recipe!(programs);
    page
}

const INTRODUCTION: &str = "\
# Recipe reference

<!-- Generated from the doc comments in src/recipe; `ECHELON_BLESS=1 cargo test recipe` rewrites it. -->

A recipe is a TOML file. A key that is not on this page is an error, and the message names the nearest one.
Relative paths start at the recipe's folder. `--set table.key=value` lays a value over the file: it is read as TOML,
else as a string, and its paths start at the working directory; `--set reward.mix.0.weight=0.5` reaches into a list.
A number whose default may be absent accepts `\"off\"`. Defaults are OpenRLHF's where it has the key.
";
