//! Which device a process computes on. CUDA is switched on at run time: opening `libtorch_cuda.so` registers its kernels.

use std::path::PathBuf;

use tch::Device;

/// What a recipe asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    Auto,
    Cpu,
    Cuda,
}

/// The device to use, and a sentence when that is not what the hardware suggests.
#[derive(Debug)]
pub struct ChosenDevice {
    pub device: Device,
    pub warning: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error(
        "device = \"cuda\": {0}; install the CUDA build with the setup command on a machine whose driver loads, or set device = \"cpu\""
    )]
    NoCuda(String),
}

/// Decides the device. Call before the first tensor is made.
///
/// # Errors
/// With [`DeviceChoice::Cuda`] where the driver or libtorch's CUDA libraries do not load: the loader's own message.
pub fn choose(choice: DeviceChoice) -> Result<ChosenDevice, DeviceError> {
    let cpu = |warning| Ok(ChosenDevice { device: Device::Cpu, warning });
    match choice {
        DeviceChoice::Cpu => cpu(None),
        DeviceChoice::Cuda => match open_driver().and_then(|()| open_cuda()) {
            Ok(()) => Ok(ChosenDevice { device: Device::Cuda(0), warning: None }),
            Err(message) => Err(DeviceError::NoCuda(message)),
        },
        DeviceChoice::Auto => match open_driver() {
            Err(_) => cpu(None),
            Ok(()) => match open_cuda() {
                Ok(()) => Ok(ChosenDevice { device: Device::Cuda(0), warning: None }),
                Err(message) => cpu(Some(format!(
                    "a CUDA driver is here, but libtorch's CUDA libraries do not load, so this runs on the CPU: {message}"
                ))),
            },
        },
    }
}

fn open_driver() -> Result<(), String> {
    open("libcuda.so.1".into())
}

fn open_cuda() -> Result<(), String> {
    open(libtorch_folder().join("libtorch_cuda.so"))?;
    if tch::Cuda::is_available() { Ok(()) } else { Err("CUDA loaded but reports no device".into()) }
}

/// Opens a library and keeps it open for the life of the process.
fn open(path: PathBuf) -> Result<(), String> {
    // SAFETY: libtorch's and the driver's initialisers are meant to run at any time before their first use.
    let library = unsafe { libloading::os::unix::Library::open(Some(path), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    library.map(std::mem::forget).map_err(|error| error.to_string())
}

/// The folder that this process's `libtorch_cpu.so` was loaded from.
fn libtorch_folder() -> PathBuf {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    maps.lines()
        .filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..])))
        .find(|path| path.file_name().is_some_and(|name| name == "libtorch_cpu.so"))
        .and_then(|path| path.parent().map(PathBuf::from))
        .unwrap_or_default()
}

/// Does `work` on a thread that ends with it.
///
/// For computing outside of a device's thread. The threads that OpenMP has called up for a thread stay as long as it does, and where there
/// are more of all of them than cores, libgomp lets every one sleep at once between two products: a driver that has multiplied
/// once slows its device thread's decoding by a quarter.
///
/// # Panics
/// When `work` does.
pub fn aside<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let done = std::thread::scope(|scope| scope.spawn(work).join());
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtorch_is_found_where_it_was_loaded_from() {
        let _ = tch::Tensor::from(1.0);
        assert!(libtorch_folder().join("libtorch_cpu.so").exists());
    }
}
