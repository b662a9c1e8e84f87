//! `ppo RECIPE`: reinforcement learning from a reward, as a recipe describes it.
//! Called by another program's name it is that program: see [`echelon::programs`].

fn main() -> ! {
    echelon::programs::as_called()
}
