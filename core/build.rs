//! Compiles the shim over libtorch (csrc/) and gives this package's tests an rpath to it.
fn main() {
    let lib = std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys tells where libtorch's lib folder is");
    let torch = std::path::Path::new(&lib).parent().expect("libtorch's lib folder has a parent");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    println!("cargo:rustc-link-search=native={lib}");
    cc::Build::new()
        .cpp(true)
        .file("csrc/kernels.cc")
        .std("c++17")
        .opt_level(3)
        .flag("-fno-math-errno")
        .compile("echelon_kernels");
    cxx_build::bridges(["src/shim.rs", "src/collective.rs"])
        .file("csrc/shim.cc")
        .file("csrc/allocator.cc")
        .file("csrc/fused.cc")
        .file("csrc/process_group.cc")
        .file("csrc/device_stream.cc")
        .file("csrc/accelerator.cc")
        .std("c++17")
        .opt_level(2)
        .flag("-Wno-unused-parameter")
        .flag("-Wno-sign-compare")
        .include("csrc")
        .include("csrc/gloo_declarations")
        .include(torch.join("include"))
        .include(torch.join("include/torch/csrc/api/include"))
        .compile("echelon_shim");
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
}
