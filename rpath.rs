//! The build script of the packages that have nothing to build: their tests find libtorch through an rpath.
fn main() {
    println!("cargo:rerun-if-changed=../rpath.rs");
    if let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    }
}
