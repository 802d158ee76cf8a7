//! Reading the source tree of the workspace.

use std::path::{Path, PathBuf};

/// Root of the workspace.
///
/// # Panics
/// If this crate lies at the top of the file system.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or_else(|| panic!("{} has no parent", here.display())).to_owned()
}

/// Text of a file, its path given from the root.
///
/// # Panics
/// If it cannot be read.
pub fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// All files with this extension under `folder`, as paths from the root, sorted.
///
/// # Panics
/// If a folder cannot be read.
pub fn files(folder: impl AsRef<Path>, extension: &str) -> Vec<PathBuf> {
    let (root, mut found) = (root(), Vec::new());
    let mut folders = vec![root.join(folder)];
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
            if path.is_dir() && !path.ends_with("target") {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path.strip_prefix(&root).unwrap_or(&path).to_owned());
            }
        }
    }
    found.sort();
    found
}

/// The lines of Rust code with comments and the content of string literals blanked, numbered from 1.
pub fn code_lines(text: &str) -> Vec<(usize, String)> {
    let mut in_string = false;
    let mut lines = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let mut code = String::new();
        let mut characters = line.chars().peekable();
        while let Some(c) = characters.next() {
            match c {
                '\\' if in_string => {
                    characters.next();
                }
                '\'' if !in_string && characters.peek() == Some(&'"') => {
                    characters.next();
                }
                '"' => in_string = !in_string,
                '/' if !in_string && characters.peek() == Some(&'/') => break,
                c if !in_string => code.push(c),
                _text => {}
            }
        }
        lines.push((index + 1, code));
    }
    lines
}
