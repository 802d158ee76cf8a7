//! The text of a kernel: its file, the headers it needs, and what is defined for it.

use std::borrow::Cow;

/// A text that NVRTC compiles by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    /// The file, or what a generated text is.
    pub(crate) file: &'static str,
    headers: &'static [Header],
    body: Cow<'static, str>,
    defines: Vec<(&'static str, String)>,
    exact: bool,
}

/// A header: name and text.
pub(crate) type Header = (&'static str, &'static str);

macro_rules! header {
    ($name:ident, $file:literal) => {
        #[doc = concat!("`kernels/", $file, "`.")]
        pub(crate) const $name: Header = ($file, include_str!(concat!("kernels/", $file)));
    };
}

header!(COMMON, "common.cuh");
header!(HALVES, "halves.cuh");
header!(MMA, "mma.cuh");
header!(PARTS, "parts.cuh");
header!(CLUSTER, "cluster.cuh");
header!(HOPPER, "hopper.cuh");
header!(GEMM, "gemm.cuh");
header!(FUNCTIONS, "functions.cuh");
header!(ROUTER, "router.cuh");
header!(ROUTE, "route.cuh");
header!(ORDER, "order.cuh");
header!(ROUTING, "routing.cuh");
header!(HEADS, "heads.cuh");
header!(TILES, "tiles.cuh");
header!(VECTORS, "vectors.cuh");
header!(NORM, "norm.cuh");
header!(LEAD, "lead.cuh");
header!(PHILOX, "philox.cuh");
header!(TASKS, "tasks.cuh");
header!(ADAMW, "adamw.cuh");

impl Source {
    /// A file of `kernels/` with its headers; [`COMMON`] comes before them by itself.
    pub(crate) fn new(file: &'static str, headers: &'static [Header], body: &'static str) -> Source {
        Source { file, headers, body: Cow::Borrowed(body), defines: Vec::new(), exact: false }
    }

    /// A text made for one node.
    pub(crate) fn generated(what: &'static str, headers: &'static [Header], body: String) -> Source {
        Source { file: what, headers, body: Cow::Owned(body), defines: Vec::new(), exact: false }
    }

    /// With this name defined.
    #[must_use]
    pub(crate) fn define(mut self, name: &'static str, value: impl ToString) -> Source {
        self.defines.push((name, value.to_string()));
        self
    }

    /// Without the compiler joining a product and a sum: each operation rounds as it is written.
    #[must_use]
    pub(crate) fn exact(mut self) -> Source {
        self.exact = true;
        self
    }

    /// The whole text.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        for (name, value) in &self.defines {
            text.push_str(&format!("#define {name} {value}\n"));
        }
        for (name, header) in [COMMON].iter().chain(self.headers) {
            text.push_str(&format!("#line 1 \"{name}\"\n{header}\n"));
        }
        text.push_str(&format!("#line 1 \"{}\"\n{}\n", self.file, self.body));
        text
    }

    /// The file and what is defined, for errors.
    pub(crate) fn title(&self) -> String {
        let defines: Vec<String> = self.defines.iter().map(|(n, v)| format!("{n}={v}")).collect();
        if defines.is_empty() { self.file.into() } else { format!("{} ({})", self.file, defines.join(", ")) }
    }

    /// The compiler's options.
    pub(crate) fn options(&self) -> &'static [&'static str] {
        if self.exact { &["--std=c++17", "--fmad=false"] } else { &["--std=c++17"] }
    }
}

#[cfg(test)]
mod tests {
    /// Every file of `kernels/` with its text.
    fn files() -> Vec<(String, String)> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/cuda/kernels");
        let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        files.map(|path| (path.display().to_string(), std::fs::read_to_string(&path).unwrap())).collect()
    }

    #[test]
    fn every_kernel_begins_with_the_wait_for_the_one_before() {
        let words = ["KERNEL ", "HOPPER_KERNEL ", "FEW_KERNEL ", "CACHE_KERNEL ", "extern \"C\" __global__"];
        let mut count = 0;
        for (file, text) in files() {
            let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("#define")).collect();
            for (i, line) in lines.iter().enumerate() {
                if words.iter().any(|word| line.starts_with(word)) {
                    let mut body = lines[i..].iter().skip_while(|line| !line.ends_with('{')).skip(1);
                    // What is known to be in memory may be loaded before, and anything be brought near.
                    let early = ["Fetched fetched;", "#if TWIN", "bring_near(twin_b, p);", "#endif"];
                    let is_early = |line: &str| early.contains(&line) || line.starts_with("if (EARLY) ");
                    let first = body.find(|line| !is_early(line.trim()));
                    assert_eq!(first.map(|line| line.trim()), Some("begin();"), "{file}: {line}");
                    count += 1;
                }
            }
        }
        assert!(count > 50, "only {count} kernels were found");
    }
}
