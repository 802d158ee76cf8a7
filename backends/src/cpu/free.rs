//! How much memory can be allocated: what the system says is available, within the limit of the process's control group.

use std::fs::read_to_string;
use std::path::Path;

/// Bytes that can be allocated without swapping or being killed for it; none where the system does not tell (not Linux).
pub(crate) fn free_memory() -> Option<u64> {
    let machine = available(&read_to_string("/proc/meminfo").ok()?)?;
    let group = read_to_string("/proc/self/cgroup").unwrap_or_default();
    // Version 2 has one line, `0::/path`. A limit of any group above counts too.
    let path = group.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let groups = Path::new("/sys/fs/cgroup").join(path);
    let limits = groups.ancestors().take_while(|p| p.starts_with("/sys/fs/cgroup")).filter_map(|group| {
        let read = |name: &str| read_to_string(group.join(name)).ok();
        left_in_group(&read("memory.max")?, &read("memory.current")?, &read("memory.stat")?)
    });
    Some(limits.fold(machine, u64::min))
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

/// What a control group may still take; none without a limit. Cached files are given up before a process is killed.
fn left_in_group(max: &str, current: &str, stat: &str) -> Option<u64> {
    let max: u64 = max.trim().parse().ok()?;
    let current: u64 = current.trim().parse().ok()?;
    let cached = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok());
    Some(max.saturating_sub(current.saturating_sub(cached.unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_s_files_are_read() {
        assert_eq!(available("MemTotal:  9 kB\nMemAvailable:    2048 kB\nBuffers: 1 kB\n"), Some(2 << 20));
        assert_eq!(available("MemTotal:  9 kB\n"), None);
        assert_eq!(left_in_group("1000\n", "700\n", "anon 600\ninactive_file 100\n"), Some(400));
        assert_eq!(left_in_group("1000\n", "1200\n", "anon 600\n"), Some(0));
        assert_eq!(left_in_group("max\n", "700\n", "anon 600\n"), None);
        if cfg!(target_os = "linux") {
            assert!(free_memory().is_some_and(|bytes| bytes > 0));
        }
    }
}
