//! `gpu-check`: what works on this machine's GPU, and how fast, in at most eight minutes.

fn main() -> ! {
    echelon::programs::gpu_check()
}
