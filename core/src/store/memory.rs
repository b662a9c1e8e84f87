//! How much memory this process may still take: what the machine has, and what its control group and limits allow.

use std::fs;

use rustix::process::{Resource, getrlimit};

use super::segment::SegmentError;

/// Below this nobody counts first: taking the memory tells.
const WORTH_COUNTING: usize = 16 << 20;

/// Refuses what would not fit, before the kernel kills somebody to make room for it.
pub(super) fn check(name: &str, len: usize) -> Result<(), SegmentError> {
    let refuse = |available, limit| Err(SegmentError::NoMemory { name: name.into(), needed: len, available, limit });
    // Beyond this limit the kernel would send a signal.
    if let Some(limit) = getrlimit(Resource::Fsize).current.filter(|limit| *limit < len as u64) {
        return refuse(limit, " (`ulimit -f`)");
    }
    if len >= WORTH_COUNTING {
        let (available, limit) = available();
        if available < len as u64 {
            return refuse(available, limit);
        }
    }
    Ok(())
}

/// The kernel had no more.
pub(super) fn none_left(name: &str, len: usize) -> SegmentError {
    let (available, limit) = available();
    SegmentError::NoMemory { name: name.into(), needed: len, available, limit }
}

/// Bytes that can be taken, and which limit is the nearest when it is not the machine's.
pub fn available() -> (u64, &'static str) {
    let machine = of_machine("MemAvailable:").unwrap_or(u64::MAX);
    match control_group().map(|(_, left)| left).min() {
        Some(group) if group < machine => (group, " (the control group's limit)"),
        _ => (machine, ""),
    }
}

/// Bytes that this process could take of an idle machine: all there are, or its control group's limit.
pub fn total() -> u64 {
    let limits = control_group().map(|(limit, _)| limit);
    limits.chain(of_machine("MemTotal:")).min().unwrap_or(u64::MAX)
}

/// A line of the kernel's account, in bytes.
fn of_machine(field: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    Some(1024 * line.trim().trim_end_matches(" kB").parse::<u64>().ok()?)
}

/// Limit of and bytes left in this process's memory control groups: version 2, or the older one.
fn control_group() -> impl Iterator<Item = (u64, u64)> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits: Vec<_> = groups.lines().filter_map(|line| left_in(line, "/sys/fs/cgroup")).collect();
    limits.into_iter()
}

/// Limit of and bytes left in the group of one line of `/proc/self/cgroup`.
fn left_in(line: &str, root: &str) -> Option<(u64, u64)> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (controllers, path) = (fields.next()?, fields.next()?);
    let (folder, limit, used, cached) = match controllers {
        "" => (root.to_string(), "memory.max", "memory.current", ["inactive_file ", "active_file "]),
        "memory" => (
            format!("{root}/memory"),
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            ["total_inactive_file ", "total_active_file "],
        ),
        _ => return None,
    };
    // In a container the group's own folder is often the root of what is mounted.
    [format!("{folder}{path}"), folder].iter().find_map(|folder| {
        let number = |file: &str| fs::read_to_string(format!("{folder}/{file}")).ok()?.trim().parse::<u64>().ok();
        let (limit, used) = (number(limit)?, number(used)?);
        // Pages of files in memory go when room is needed.
        let stat = fs::read_to_string(format!("{folder}/memory.stat")).unwrap_or_default();
        let reclaimable = stat.lines().filter_map(|line| {
            cached.iter().find_map(|key| line.strip_prefix(key)).and_then(|value| value.parse::<u64>().ok())
        });
        Some((limit, limit.saturating_sub(used.saturating_sub(reclaimable.sum()))))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_memory_and_not_endless() {
        let (available, _) = available();
        assert!(available > 1 << 20 && available < 1 << 50, "{available}");
        assert!(total() >= available, "{} in all", total());
    }

    #[test]
    fn groups_of_both_versions_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let write = |file: &str, text: &str| {
            let path = root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("job/memory.max", "1000\n");
        write("job/memory.current", "700\n");
        write("job/memory.stat", "anon 400\ninactive_file 200\nactive_file 100\n");
        write("memory/memory.limit_in_bytes", "500\n");
        write("memory/memory.usage_in_bytes", "600\n");
        write("free/memory.max", "max\n");
        let root_text = root.to_str().unwrap();
        assert_eq!(left_in("0::/job", root_text), Some((1000, 600)));
        assert_eq!(left_in("4:memory:/not/mounted/here", root_text), Some((500, 0)));
        assert_eq!(left_in("0::/free", root_text), None, "no limit");
        assert_eq!(left_in("3:cpuset:/", root_text), None);
    }
}
