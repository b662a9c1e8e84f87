//! Which device a process computes on. CUDA is switched on at run time: opening `libtorch_cuda.so` registers its kernels.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use echelon_schema::choice;
use tch::Device;

choice! {
    /// Kind of device.
    pub enum DeviceChoice {
        /// CUDA where it works, else the CPU.
        Auto = "auto",
        /// The CPU.
        Cpu = "cpu",
        /// NVIDIA GPUs.
        Cuda = "cuda",
    }
}

/// The device to use, and a sentence when that is not what the hardware suggests.
#[derive(Debug)]
pub struct ChosenDevice {
    pub device: Device,
    pub warning: Option<String>,
}

#[derive(Debug, thiserror::Error)]
#[error("device = \"cuda\": {0}; or set device = \"cpu\"")]
pub struct NoCuda(String);

impl NoCuda {
    /// The reason alone, and what would mend it.
    pub fn why(&self) -> &str {
        &self.0
    }
}

/// Decides the device. Call before the first tensor is made.
///
/// # Errors
/// With [`DeviceChoice::Cuda`] where the driver or libtorch's CUDA libraries do not load: the loader's own message.
pub fn choose(choice: DeviceChoice) -> Result<ChosenDevice, NoCuda> {
    let on = |device, warning| Ok(ChosenDevice { device, warning });
    match choice {
        DeviceChoice::Cpu => on(Device::Cpu, None),
        DeviceChoice::Cuda => {
            open_driver().and_then(|()| open_cuda()).map_err(NoCuda)?;
            on(Device::Cuda(0), None)
        }
        DeviceChoice::Auto if open_driver().is_err() => on(Device::Cpu, None),
        DeviceChoice::Auto => match open_cuda() {
            Ok(()) => on(Device::Cuda(0), None),
            Err(message) => {
                let why = "a CUDA driver is here, but libtorch's CUDA libraries do not load, so this runs on the CPU";
                on(Device::Cpu, Some(format!("{why}: {message}")))
            }
        },
    }
}

fn open_driver() -> Result<(), String> {
    open("libcuda.so.1".into())
        .map(drop)
        .map_err(|error| format!("this machine has no NVIDIA driver that loads ({error}): install one"))
}

fn open_cuda() -> Result<(), String> {
    let library = libtorch_folder().join("libtorch_cuda.so");
    if !library.exists() {
        return Err(format!(
            "the PyTorch in {} was built without CUDA: run ECHELON_CUDA=yes ./echelon setup, or let LIBTORCH name one with it",
            libtorch_folder().parent().unwrap_or(&library).display()
        ));
    }
    if let Some(why) = too_old() {
        return Err(why); // before libtorch says so in its own way
    }
    open(library).map_err(|error| {
        format!("a part of PyTorch's CUDA libraries is missing ({error}): install them, as pip install torch does")
    })?;
    if !tch::Cuda::is_available() {
        return Err(why_no_device());
    }
    VISIBLE.store(tch::Cuda::device_count() as usize, Ordering::Relaxed);
    Ok(())
}

static VISIBLE: AtomicUsize = AtomicUsize::new(0);

/// GPUs that CUDA shows to this process; 0 before [`choose`] has loaded it.
pub fn num_visible() -> usize {
    VISIBLE.load(Ordering::Relaxed)
}

/// Why there is no device, though driver and libraries load.
fn why_no_device() -> String {
    match std::env::var("CUDA_VISIBLE_DEVICES") {
        Ok(list) if !starts_with_a_device(&list) => {
            format!("CUDA_VISIBLE_DEVICES is `{list}`, which hides every GPU: unset it, or name those to use (0,1)")
        }
        Ok(list) => {
            format!("CUDA_VISIBLE_DEVICES is `{list}`, and the driver has none of these: nvidia-smi -L lists its GPUs")
        }
        Err(_) => "the NVIDIA driver loads and has no GPU that works: nvidia-smi says more".into(),
    }
}

/// That the driver is too old for this libtorch, where it is.
fn too_old() -> Option<String> {
    let (serves, needs) = (driver_serves()?, libtorch_needs()?);
    (serves.0 < needs.0).then(|| {
        format!(
            "the NVIDIA driver serves CUDA {}.{}, and this PyTorch needs {}.{}: update the driver, or let LIBTORCH name a \
             PyTorch made for CUDA {}",
            serves.0, serves.1, needs.0, needs.1, serves.0
        )
    })
}

/// Whether the list's first entry means a device: it ends at the first that means none.
fn starts_with_a_device(list: &str) -> bool {
    let first = list.split(',').next().unwrap_or_default().trim();
    !first.is_empty() && !first.starts_with('-')
}

/// The newest CUDA that the driver can serve, as major and minor number.
fn driver_serves() -> Option<(i32, i32)> {
    let library = open("libcuda.so.1".into()).ok()?;
    let mut version = 0;
    // SAFETY: the driver's function of this name has this type, and may be called before any other.
    let code = unsafe {
        let read: libloading::os::unix::Symbol<unsafe extern "C" fn(*mut i32) -> i32> =
            library.get(b"cuDriverGetVersion\0").ok()?;
        read(&mut version)
    };
    (code == 0 && version > 0).then_some((version / 1000, version % 1000 / 10))
}

/// The CUDA that libtorch was made for, as its `version.py` says.
fn libtorch_needs() -> Option<(i32, i32)> {
    let text = std::fs::read_to_string(libtorch_folder().parent()?.join("version.py")).ok()?;
    let line = text.lines().find(|line| line.starts_with("cuda"))?;
    let (major, minor) = line.split('\'').nth(1)?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Opens a library, which stays open for the life of the process.
fn open(path: PathBuf) -> Result<std::mem::ManuallyDrop<libloading::os::unix::Library>, String> {
    // SAFETY: libtorch's and the driver's initialisers are meant to run at any time before their first use.
    let library = unsafe { libloading::os::unix::Library::open(Some(path), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    library.map(std::mem::ManuallyDrop::new).map_err(|error| error.to_string())
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
    fn a_list_of_devices_may_hide_them_all() {
        for (list, some) in [("0,1", true), ("GPU-5a1e", true), ("", false), ("-1", false), (" ,0", false)] {
            assert_eq!(starts_with_a_device(list), some, "{list:?}");
        }
    }

    #[test]
    fn libtorch_is_found_where_it_was_loaded_from() {
        let _ = tch::Tensor::from(1.0);
        assert!(libtorch_folder().join("libtorch_cpu.so").exists());
    }
}
