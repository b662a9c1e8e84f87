//! The programs that learn, each by its recipe. A new algorithm has a line here.

/// Hands every recipe's type to a macro.
macro_rules! for_each_recipe {
    ($then:ident) => {
        $then! {
            $crate::recipe::Recipe<echelon_algorithms::ppo::PpoKeys>,
            $crate::recipe::SftRecipe,
            $crate::recipe::RewardRecipe,
        }
    };
}
pub(crate) use for_each_recipe;

/// Refuses two programs of one name: a worker could not tell whose run it is in.
///
/// # Errors
/// A sentence with the name and all others.
pub fn check_names(names: &[&str]) -> Result<(), String> {
    match names.iter().enumerate().find(|(index, name)| names[..*index].contains(name)) {
        None => Ok(()),
        Some((_, name)) => {
            Err(format!("two algorithms are registered as `{name}` (of {}): give one another NAME", names.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_stands_twice_is_told() {
        assert!(check_names(&["ppo", "sft", "reward"]).is_ok());
        let error = check_names(&["ppo", "sft", "ppo"]).unwrap_err();
        assert!(error.contains("registered as `ppo` (of ppo, sft, ppo)"), "{error}");
    }
}
