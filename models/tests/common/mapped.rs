//! Where a tensor's memory is.

use std::path::Path;

use tch::Tensor;

/// Whether a tensor's memory is a map of a file in `folder`.
pub fn lies_in(folder: &Path, tensor: &Tensor) -> bool {
    let (at, folder) = (tensor.data_ptr() as usize, folder.canonicalize().unwrap());
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains(folder.to_str().unwrap())).any(|line| {
        let (begin, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let [begin, end] = [begin, end].map(|address| usize::from_str_radix(address, 16).unwrap());
        (begin..end).contains(&at)
    })
}
